"""The compiler of a rehearsal: inductor as far as its own cut of a graph into forward and backward.

What a compiled layer keeps for its backward is decided there. The two graphs then run operator by operator on fake
tensors: what they allocate and free inside is not what the kernels of a program do, and no figure has it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx.graph import _BoxedCodeGen


def partition(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The backend for `torch.compile`."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    as_it_is: Any = _as_it_is
    with config.patch(enable_autograd_cache=False):  # it may have the programs of a real run
        program: Any = compile_fx(
            graph, inputs, inner_compile=as_it_is, config_patches={"fallback_random": True}
        )
    return program  # type: ignore[no-any-return]


def _as_it_is(graph: torch.fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    """`graph` itself, which frees each argument after its last use."""
    graph.graph.set_codegen(_BoxedCodeGen())
    graph.recompile()

    def run(arguments: list[Any]) -> Any:
        return graph.forward(arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
