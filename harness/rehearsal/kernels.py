"""Functions for which a GPU may have special kernels, where a rehearsal runs reference code.

transformers looks for the packages of such kernels at import, and uses code in plain torch where they are missing.
The functions that a model calls are read from the code of its layers. So this works for any model, and considers only
its own layers.
"""

import inspect
import sys
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch

from harness.model import init_weights
from harness.model.loader import quiet
from harness.model.plan import Plan

PACKAGES = {
    **dict.fromkeys(("causal_conv1d_fn", "causal_conv1d_update"), "causal_conv1d"),
    **dict.fromkeys(("mamba_inner_fn", "selective_scan_fn", "selective_state_update"), "mamba_ssm"),
    **dict.fromkeys(("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"), "mamba_ssm"),
    **dict.fromkeys(("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"), "fla"),
    "rwkv_linear_attention": "kernels",
    "external_xlstm": "xlstm",
}
"""Functions in models' code and the package with their kernel, where the function itself does not carry the name."""

DISTRIBUTIONS = {"fla": "flash-linear-attention"}
"""The pip name of a package, where it differs from the import name."""


def difference(plan: Plan) -> str | None:
    """A sentence with the model's functions that are reference code here and may be kernels on a GPU, or None."""
    with quiet():
        model = init_weights.outline(plan.config, torch.bfloat16, plan.settings.model.attention)
    classes = {base for module in model.modules() for base in type(module).__mro__}
    model_classes = [each for each in classes if each.__module__.startswith("transformers.models.")]
    packages_by_name = {name: package for each in model_classes for name, package in _kernels(each)}
    if not packages_by_name:
        return None
    packages = sorted({DISTRIBUTIONS.get(each, each.replace("_", "-")) for each in packages_by_name.values()})
    return (
        f"{', '.join(sorted(packages_by_name))} run here as reference code: on a GPU kernels of "
        f"{', '.join(packages)} run instead, where those are installed, and may need other bytes"
    )


def _kernels(kind: type) -> Iterator[tuple[str, str]]:
    """The functions that a class calls and that have a kernel elsewhere but not here, each with that package."""
    namespace = vars(sys.modules[kind.__module__])
    yield from ((name, package) for name, package in PACKAGES.items() if namespace.get(name) is False)
    for function in filter(inspect.isfunction, vars(kind).values()):
        for name in _names(inspect.unwrap(function).__code__) & set(namespace):
            closure = _closure(namespace[name])
            if closure.get("is_new_implementation") is False:  # transformers' decorator found no package
                yield str(closure["func_name"]), str(closure["package"])
            elif not closure and name in PACKAGES:
                yield name, PACKAGES[name]


def _closure(value: Any) -> dict[str, Any]:
    """The closure variables of transformers' kernel decorator; empty for a function without that decorator."""
    while inspect.isfunction(value):
        variables = dict(inspect.getclosurevars(value).nonlocals)
        if {"func_name", "package", "is_new_implementation"} <= set(variables):
            return variables
        value = getattr(value, "__wrapped__", None)
    return {}


def _names(code: CodeType) -> set[str]:
    """Every name that `code` and its nested code look up."""
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(_names, inner))
