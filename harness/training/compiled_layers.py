"""Layers that are compiled for training, each by itself and whole, in its place in the model.

Layers that are alike share one program, whatever their number: the compiler reads the layer, and not the model. Around
them DeepSpeed, the embedding, the head and the loss are as they were. `config/rules/compiled.py` says what cannot be
compiled so. Random numbers are the eager ones, so that results are equal but for rounding.
"""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import PreTrainedModel

from harness.config.errors import first_line
from harness.config.load import Refusal
from harness.ledger.patch import DATA, TORCH, Patch, install, table
from harness.model.stage import layers_for
from harness.runtime.compiler import not_compiled
from harness.runtime.course import Backend

_CALL = "_compiled_call_impl"

PATCHES = table(
    Patch(
        "torch.nn.Module",
        _CALL,
        "a layer is called as its compiled program, which is refused where it cannot be compiled",
        TORCH,
        unchecked=DATA,
        stays="as long as the model lives",
    )
)


def apply(model: PreTrainedModel, backend: Backend) -> None:
    """Let each layer of `model` be compiled by `backend` where it is first called, and again for another kind of call,
    as in a validation. A call then raises Refusal where the layer cannot be compiled whole.

    Raises Refusal where the model has no list of layers.
    """
    _, layers = layers_for(model, "train.compile", True, "leave it out")
    torch.compiler.reset()  # it compiles a function a few times only, and those of an earlier run would count
    for layer in layers:
        _compile(layer, backend)


def uncompiled() -> AbstractContextManager[None]:
    """Inside this context the layers run as they are written, so that hooks of their modules are called."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def _compile(layer: torch.nn.Module, backend: Backend) -> None:
    program = torch.compile(layer._call_impl, fullgraph=True, dynamic=False, **_options(backend))
    call = _checked(program)
    install(PATCHES[f"torch.nn.Module.{_CALL}"].by(lambda _: call, layer))


def _options(backend: Backend) -> dict[str, Any]:
    return {"options": {"fallback_random": True}} if backend == "inductor" else {"backend": backend}


def _checked(program: Callable[..., Any]) -> Callable[..., Any]:
    """`program`; the first call raises Refusal where torch cannot compile it.

    Reference cycles of the compiler hold tensors of the call that it traced. They are freed at once, and not when
    Python comes to them, so that a run has the same bytes each time.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        before = _graphs()
        try:
            output = program(*args, **kwargs)
        except not_compiled() as error:
            remedy = f"a layer of the model cannot be compiled ({first_line(_cause(error))}); leave it out"
            raise Refusal("train.compile", True, remedy) from error
        if _graphs() != before:
            gc.collect()
        return output

    return call


def _cause(error: Exception) -> Exception:
    """What went wrong: torch's own error may say only whose it is."""
    cause: Exception = getattr(error, "inner_exception", error)
    return cause


def _graphs() -> int:
    """How many graphs were compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
