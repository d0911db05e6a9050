"""What a GPU may compute with kernels of its own, where a rehearsal runs reference code.

transformers looks for the packages of such kernels when it is imported, and takes code in plain torch where they are
not there. Which functions a model's layers call is read off their code: so for any model, and for its own layers alone.
"""

import inspect
import sys
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch

from harness.config.settings import Settings
from harness.model import init_weights
from harness.model.loader import model_config, quiet

PACKAGES = {
    **dict.fromkeys(("causal_conv1d_fn", "causal_conv1d_update"), "causal_conv1d"),
    **dict.fromkeys(("mamba_inner_fn", "selective_scan_fn", "selective_state_update"), "mamba_ssm"),
    **dict.fromkeys(("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"), "mamba_ssm"),
    **dict.fromkeys(("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"), "fla"),
    "rwkv_linear_attention": "kernels",
    "external_xlstm": "xlstm",
}
"""Names in a model's code of what a package has a kernel for, where the function does not know that itself."""

DISTRIBUTIONS = {"fla": "flash-linear-attention"}
"""What is installed to have a package, where that has another name."""


def difference(settings: Settings) -> str | None:
    """The functions of `settings`' model that are reference code here and kernels on a GPU, in a sentence."""
    with quiet():
        model = init_weights.outline(model_config(settings.model), torch.bfloat16, settings.model.attention)
    classes = {base for module in model.modules() for base in type(module).__mro__}
    own = [each for each in classes if each.__module__.startswith("transformers.models.")]
    found = {name: package for each in own for name, package in _kernels(each)}
    if torch.nn.RMSNorm in classes:
        found["rms_norm"] = "torch"
    if not found:
        return None
    packages = sorted({DISTRIBUTIONS.get(each, each.replace("_", "-")) for each in found.values()})
    return (
        f"{', '.join(sorted(found))} run here as reference code: on a GPU kernels of {', '.join(packages)} run "
        "instead, where those are installed, and may hold other bytes"
    )


def _kernels(kind: type) -> Iterator[tuple[str, str]]:
    """What the code of a class calls that has a kernel elsewhere, and not here."""
    room = vars(sys.modules[kind.__module__])
    yield from ((name, package) for name, package in PACKAGES.items() if room.get(name) is False)
    for function in filter(inspect.isfunction, vars(kind).values()):
        for name in _names(inspect.unwrap(function).__code__) & set(room):
            within = _closure(room[name])
            if within.get("is_new_implementation") is False:  # transformers' decorator found no package
                yield str(within["func_name"]), str(within["package"])
            elif not within and name in PACKAGES:
                yield name, PACKAGES[name]


def _closure(value: Any) -> dict[str, Any]:
    """What a function that transformers' decorator made knows of the kernel; nothing, of any other."""
    while inspect.isfunction(value):
        found = dict(inspect.getclosurevars(value).nonlocals)
        if {"func_name", "package", "is_new_implementation"} <= set(found):
            return found
        value = getattr(value, "__wrapped__", None)
    return {}


def _names(code: CodeType) -> set[str]:
    """Every name that `code`, and what is defined in it, looks up."""
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(_names, inner))
