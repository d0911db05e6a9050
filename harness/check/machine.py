"""The machine that `harness verify` runs on: its hardware page, its driver, and who else uses its GPU."""

import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from harness.config import hardware_page
from harness.record.fields import printable
from harness.record.record_file import processor

PROBE = "from harness.check.machine import probe; probe()"


class Machine(NamedTuple):
    """`page` is the hardware page to rehearse for, `name` the name of its files."""

    name: str
    page: str
    device: str
    device_name: str
    driver: str | None = None
    note: str = ""


def here(page: str | None = None) -> Machine:
    """This machine, with the hardware page of this name, or the one that its GPU's name says. Raises ValueError.

    A process of its own asks CUDA, so that this one never uses the GPU.
    """
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise ValueError(f"verify: the device cannot be asked what it is: {printable(last)}")
    return of(json.loads(done.stdout.splitlines()[-1]), page)


def probe() -> None:
    """Print as JSON what CUDA, its driver and NVML say. It has never run on CUDA."""
    import torch

    from harness.ledger.cuda_allocator import number_of_processes

    said: dict[str, Any] = {"device_name": None, "processor": processor() or platform.machine()}
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")  # now this process is one of those on the GPU
        said |= {"device_name": torch.cuda.get_device_name(), "driver": _driver(), "processes": 0}
        with suppress(Exception):  # NVML's errors are its own
            said["processes"] = number_of_processes(torch.cuda.list_gpu_processes())
    print(json.dumps(said))


def of(said: Mapping[str, Any], page: str | None = None) -> Machine:
    """The machine of what `probe` says. Raises ValueError for a GPU that has no page, and for a page of another."""
    device_name, processor_name = said["device_name"], said["processor"]
    if device_name is None:
        if page not in (None, "cpu"):
            raise ValueError(
                f"verify: --hardware {page}: there is no GPU here, and a processor has the page cpu"
            )
        slug = "-".join(re.findall("[a-z0-9]+", processor_name.lower()))
        return Machine(slug or "processor", "cpu", "cpu", processor_name)
    if page is not None:
        hardware_page.gpu(page)
    page = page or hardware_page.of_device(device_name)
    if page is None:
        unknown = f"no page in conf/hardware is of {printable(device_name)!r}"
        raise ValueError(f"verify: {unknown}; add one, or name one by --hardware")
    others = said["processes"] - 1
    note = f"others used this GPU, with {others} process{'es' * (others > 1)}" if others > 0 else ""
    return Machine(page, page, "cuda", device_name, said["driver"], note)


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return next(iter(done.stdout.strip().splitlines()), None)
