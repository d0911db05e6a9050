"""What is counted to move, against the bytes that a network of its own carries between the ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.record.links import by_ring
from tests.distributed import wire

UP = (
    "import fcntl, os, socket, struct, sys; "
    "request = struct.pack('16sh', b'lo', 0x41); "  # IFF_UP | IFF_RUNNING
    "fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8914, request); "  # SIOCSIFFLAGS
    "os.execvp(sys.argv[1], sys.argv[1:])"
)
"""Start the loopback device of a new network, then the command."""

ALONE = ("unshare", "--user", "--map-root-user", "--net")

HEADER = 86
"""The most bytes of Ethernet's, IPv6's and TCP's headers, with a time stamp, in a packet."""
SEGMENT = 65_536
"""The most bytes of a TCP segment on the loopback device. On a busy machine some are sent twice."""
MESSAGES = 1.001
"""Gloo's own messages beside the payload: it announces each buffer, and the barriers around the calls."""


def has_networks() -> bool:
    """Whether this machine lets a process have a network of its own."""
    try:
        return subprocess.run([*ALONE, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not has_networks(), reason="this machine gives no process a network of its own")
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_the_bytes_on_the_wire_are_those_of_the_payload(ranks: int) -> None:
    launcher = ["torchrun", "--standalone", f"--nproc-per-node={ranks}", str(Path(wire.__file__))]
    done = subprocess.run(
        [*ALONE, sys.executable, "-c", UP, sys.executable, "-m", *_module(launcher)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    for name, (counted, carried, packets, again) in figures.items():
        if name != "DistributedDataParallel":  # which also says how it has arranged its buckets
            assert counted == {name: wire.TIMES * wire.ELEMENTS * 4}
        expected = sum(sent(operation, payload, ranks) for operation, payload in counted.items())
        assert expected <= carried, name
        assert carried - packets * HEADER - again * SEGMENT <= expected * MESSAGES, name


def sent(operation: str, payload: int, ranks: int) -> int:
    """What all ranks send, by gloo."""
    if operation in ("send", "broadcast"):
        return payload * (1 if operation == "send" else ranks - 1)  # the last one sends nothing
    if operation == "reduce-scatter":  # gloo reduces all, and takes a part
        operation = "all-reduce"
    each = by_ring(operation, payload, ranks)
    assert each is not None
    return each * ranks


def _module(launcher: list[str]) -> list[str]:
    """torchrun as a module, so that it is this Python's."""
    return ["torch.distributed.run", *launcher[1:]]
