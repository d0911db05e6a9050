"""What each operator moves and computes, derived from its schema, in bytes and operations.

Operations are those of matrix products, convolutions and attention, by the formulas of `torch.utils.flop_counter`, or
by similar formulas where it has none. By its convention an addition and a multiplication are two operations, masked
scores count like others, and every other operator has 0.
"""

import re
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

from harness.ledger.tensors import tensors_in

_aten = torch.ops.aten


def _packets(*names: str) -> frozenset[Any]:
    return frozenset(getattr(_aten, name) for name in names if hasattr(_aten, name))


NOTHING = _packets(
    *("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("resize_", "set_", "record_stream", "is_same_size", "is_pinned", "_has_compatible_shallow_copy_type"),
    "_local_scalar_dense",  # the host reads a number
)
"""Operators that move no bytes, besides those that only return views."""

OVERWRITES = _packets(
    *("copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "exponential_", "bernoulli_"),
    *("zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"),
    *("new_zeros", "new_ones", "new_full"),
)
"""Operators that do not read the values of their first tensor."""

MEMORY = _packets("resize_", "resize_as_", "_resize_output_", "set_", "lift", "lift_fresh")
"""Operators that give their result other memory, or return memory that no operator allocated."""

TAKES = _packets("embedding", "index_select", "gather", "index", "take")
"""Operators that read as many bytes of their first tensor as they return."""

PUTS = {
    **dict.fromkeys(_packets("index_put_"), 2),
    **dict.fromkeys(_packets("index_copy_", "index_add_"), 3),
    **dict.fromkeys(_packets("scatter_", "scatter_add_", "scatter_reduce_"), 2),
}
"""Operators that write as many elements of their first tensor as the argument at this position has."""
ADDS = _packets("index_add_", "scatter_add_", "scatter_reduce_")
"""Those of `PUTS` that also read these elements."""

SHAPE_ONLY = {_aten.nll_loss_backward: 1, _aten.nll_loss_forward: 0}
"""Operators that use the tensor at this position only for its shape, or for one element of each row."""


def _attention(query: Any, key: Any, value: Any, *others: Any) -> int:
    """The scores, and their product with the values: `sdpa_flop_count`, also for fewer key heads than query heads."""
    return sum(_product_flops(query, key, value))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *others: Any) -> int:
    """The scores again, and two products for each of the forward's: `sdpa_backward_flop_count`."""
    scores, value_product = _product_flops(query, key, value)
    return 3 * scores + 2 * value_product


def _product_flops(query: Any, key: Any, value: Any) -> tuple[int, int]:
    pairs: int = 2 * prod(query.shape[:-1]) * key.shape[-2]
    return pairs * query.shape[-1], pairs * value.shape[-1]


def _linear(tensor: Any, weight: Any, *others: Any) -> int:
    return int(2 * tensor.numel() * weight.shape[0])


def _matmul(left: Any, right: Any, *others: Any) -> int:
    columns = right.shape[-1] if right.dim() > 1 else 1
    rows = left.shape[-2] if left.dim() > 1 else 1
    batch = prod(torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]))
    return int(2 * batch * rows * left.shape[-1] * columns)


def _grouped_matmul(left: Any, right: Any, *others: Any) -> int:
    """Each row is multiplied with one of the matrices, or each part of the inner dimension has its own product."""
    groups = left.shape[0] if left.dim() == right.dim() == 3 else 1
    return int(2 * groups * left.shape[-2] * left.shape[-1] * right.shape[-1])


def _add_matmul(_: Any, left: Any, right: Any, *others: Any) -> int:
    return _matmul(left, right)


_SDPA = "_scaled_dot_product_"
_KERNELS = tuple(f"{_SDPA}{kind}" for kind in ("flash_attention", "efficient_attention", "cudnn_attention"))
_OTHERS = tuple(f"{_SDPA}{kind}" for kind in ("flash_attention_for_cpu", "fused_attention_overrideable"))

FORMULAS: dict[Any, Callable[..., int]] = {
    **dict.fromkeys(_packets("scaled_dot_product_attention", *_KERNELS, *_OTHERS), _attention),
    **dict.fromkeys(_packets(*(f"{name}_backward" for name in (*_KERNELS, *_OTHERS))), _attention_backward),
    **dict.fromkeys(_packets("mm", "bmm", "mv", "dot", "vdot", "matmul"), _matmul),
    **dict.fromkeys(_packets("addmm", "baddbmm", "addmv", "addbmm", "addmm_", "baddbmm_"), _add_matmul),
    **dict.fromkeys(_packets("linear"), _linear),
    **dict.fromkeys(_packets("_grouped_mm", "_scaled_grouped_mm"), _grouped_matmul),
}
"""Operations by the arguments. `linear`, `matmul` and `scaled_dot_product_attention` are dispatched whole only in
inference mode."""


class Rule(NamedTuple):
    """How to compute an operator's work from its arguments. A place is a position or a keyword."""

    unread: frozenset[int | str]
    mutated: frozenset[int | str]
    makes: bool  # it returns new memory
    may_copy: bool  # it returns a view, or a copy if no view is possible
    takes: bool
    puts: int | None
    adds: bool
    picks: bool  # it reads one element of each row
    flops: Callable[..., int] | None


UNKNOWN = Rule(frozenset(), frozenset(), False, False, False, None, False, False, None)
"""The rule of an operator that runs other operators, such as `torch.cond`: its work is not known."""


def views(func: Any) -> bool:
    """Whether `func` allocates no storage: everything it returns lies in its arguments."""
    if not isinstance(func, OpOverload):
        return False
    returns, composite = func._schema.returns, torch._C.DispatchKey.CompositeImplicitAutograd
    aliases = bool(returns) and all(value.alias_info is not None for value in returns)
    return aliases and func._overloadpacket not in MEMORY and not func.has_kernel_for_dispatch_key(composite)


def rule_of(func: Any) -> Rule | None:
    """The rule of `func`, from its schema. None if it moves nothing."""
    if not isinstance(func, OpOverload):
        return UNKNOWN
    packet, schema = func._overloadpacket, func._schema
    if func.namespace in ("c10d", "_c10d_functional") or packet in NOTHING:
        return None
    mutated: set[int | str] = set()
    unread: set[int | str] = {0} if packet in OVERWRITES or packet in TAKES or packet in PUTS else set()
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            mutated |= {place, argument.name}
            if argument.kwarg_only:  # out=
                unread.add(argument.name)
    aliases = [each.alias_info is not None for each in schema.returns]
    composite = func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    if not mutated and aliases and all(aliases):
        if not composite:
            return None
        unread.update(range(len(schema.arguments)), (argument.name for argument in schema.arguments))
    if packet in SHAPE_ONLY:
        unread.add(SHAPE_ONLY[packet])
    if packet in PUTS:
        mutated -= {0, schema.arguments[0].name}
    if packet is _aten._fused_adamw_ or packet is _aten._fused_adam_:
        mutated -= {1, "grads"}  # written only if they are scaled
    return Rule(
        frozenset(unread),
        frozenset(mutated),
        not any(aliases),
        bool(aliases) and all(aliases) and not mutated,
        packet in TAKES,
        PUTS.get(packet),
        packet in ADDS,
        packet is _aten.nll_loss_forward,
        _flops(packet),
    )


def _flops(packet: Any) -> Callable[[Any, Any, Any], int] | None:
    """The function from arguments and results of `packet` to operations. None if there is no formula."""
    formula, torch_formula = FORMULAS.get(packet), flop_registry.get(packet)
    if formula is not None:
        return lambda args, kwargs, out: formula(*args)
    if torch_formula is not None:
        return lambda args, kwargs, out: int(torch_formula(*args, **kwargs, out_val=out))
    return _packed_matmul if packet in PACKED or _multiplies(packet._qualified_op_name) else None


PACKED = _packets(
    *("_int_mm", "_scaled_mm_v2", "_weight_int8pack_mm", "_weight_int4pack_mm"),
    *("_weight_int4pack_mm_for_cpu", "_dyn_quant_matmul_4bit"),
)
"""Operators that multiply with a weight of few bits, whose shape is not the weight's true shape."""


def _multiplies(name: str) -> bool:
    """Whether the name of a library's own operator says that it multiplies matrices."""
    match = re.search("(_|::)(gemm|gemv|mm|matmul|linear)(_|$)", name)
    return match is not None and not re.search("^aten::|pack|backward", name)


def _packed_matmul(args: Any, kwargs: Any, out: Any) -> int:
    """Operations of a product [..., in] x packed weight -> [..., out]."""
    tensor = next((each for each in args if isinstance(each, torch.Tensor)), None)
    product = next(tensors_in(out), None)
    if tensor is None or product is None or not product.dim():
        return 0
    return int(2 * tensor.numel() * product.shape[-1])
