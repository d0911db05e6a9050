"""The product, under torchrun, for each of several lists of words: forks of processes that have imported it once."""

import json
import os
import sys
from pathlib import Path

from torch._C._distributed_c10d import TCPStore

from harness import infer, train  # noqa: F401 - what is slow to import
from harness.__main__ import main

address, rank = os.environ["MASTER_ADDR"], os.environ["RANK"]
agents = TCPStore(address, int(os.environ["MASTER_PORT"]), is_master=False)
for number, words in enumerate(json.loads(Path(sys.argv[1]).read_text())):
    key = f"one_after_another/{number}"
    if rank == "0":  # each run meets at a store of its own, as under a torchrun of its own
        own = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        agents.set(key, str(own.port))
    os.environ["MASTER_PORT"] = agents.get(key).decode()
    child = os.fork()
    if child == 0:
        code = main(words)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    os.waitpid(child, 0)  # how it went is in its record
