"""Imports that take seconds, without what a run does not use."""

import gc
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from harness.ledger.patch import TORCH, Patch, patched, table

PATCHES = table(Patch("torch", "compile", "where it is called, all of the compiler is imported", TORCH))

_MUON = "deepspeed.runtime.zero.muon.original_muon"
"""Compiles functions with `torch.compile` where it is imported, and DeepSpeed imports it to know an optimizer by."""


@contextmanager
def without_collection() -> Iterator[None]:
    """No garbage is collected in this context: what modules define stays, and looking through it takes a sixth."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def import_deepspeed() -> Any:
    """DeepSpeed, without what only its autotuner and another optimizer need: MLflow, and torch's compiler."""
    with without_collection(), _absent("mlflow"), patched(PATCHES["torch.compile"].by(_when_called)):
        deepspeed = import_module("deepspeed")
        with patched(PATCHES["torch.compile"].by(_not_at_all)):
            import_module(_MUON)
    return deepspeed


def import_bitsandbytes() -> Any:
    """bitsandbytes, without torch's compiler, and without what it says of kernels for packed weights."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with without_collection(), patched(PATCHES["torch.compile"].by(_when_called)):
        return import_module("bitsandbytes")


def import_peft() -> Any:
    """peft, which imports bitsandbytes and torchao where those are installed."""
    hush_torchao()
    if find_spec("bitsandbytes") is not None:
        import_bitsandbytes()
    return import_module("peft")


def import_torchao() -> Any:
    """`torchao.float8`, without torch's compiler."""
    hush_torchao()
    with without_collection(), patched(PATCHES["torch.compile"].by(_when_called)):
        return import_module("torchao.float8")


def hush_torchao() -> None:
    """Let torchao, which transformers and peft import where it is installed, not warn of kernels that nothing uses."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def _absent(name: str) -> Iterator[None]:
    """In this context the import of a module fails, unless the program has imported it."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def _not_at_all(original: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` that leaves a function as it is: Muon's would be compiled for each shape of a matrix, by a C++
    compiler on a CPU, and a ledger would not see inside.
    """
    return lambda model=None, **options: (lambda model: model) if model is None else model


def _when_called(original: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` of a function that compiles it when it is called first."""

    def stand_in(model: Any = None, **options: Any) -> Any:
        if model is None:
            return lambda model: stand_in(model, **options)
        compiled: list[Any] = []

        @wraps(model)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not compiled:
                compiled.append(original(model, **options))
            return compiled[0](*args, **kwargs)

        return call

    return stand_in
