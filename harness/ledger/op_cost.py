"""What each operator moves and computes, derived from its schema, in bytes and operations.

Operations are those of matrix products, convolutions and attention, by the formulas of `torch.utils.flop_counter`, or
by similar formulas where it has none. By its convention an addition and a multiplication are two operations, masked
scores count like others, and every other operator has 0.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

from harness.ledger.categories import CLASSES
from harness.ledger.collective_kinds import Collective as Collective
from harness.ledger.collective_kinds import kind_of
from harness.ledger.tensors import tensors_in

_aten = torch.ops.aten

COLLECTIVES = ("c10d", "_c10d_functional")
"""Namespaces of collective operators. Those of the second return new tensors."""
POINT_TO_POINT = ("send", "recv_", "recv_any_source_", "wait_tensor")
"""Operators that send, receive or wait for one tensor. It keeps its category."""

COPIES = {_aten._to_copy: 0, _aten.to: 0, _aten.type_as: 0, _aten.copy_: 1}
"""Operators that may copy from one device to another, and the position of the source. They return the destination.

`to` and `type_as` are dispatched whole only in inference mode, and below autograd.
"""


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


def _product(left: Any, right: Any, *others: Any) -> int:
    """One matrix with another, or as many with as many."""
    return int(2 * left.numel() * right.shape[-1])


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


def _add_product(_: Any, left: Any, right: Any, *others: Any) -> int:
    return _product(left, right)


def _add_vector(_: Any, left: Any, right: Any, *others: Any) -> int:
    return _matmul(left, right)


_SDPA = "_scaled_dot_product_"
_KERNELS = tuple(f"{_SDPA}{kind}" for kind in ("flash_attention", "efficient_attention", "cudnn_attention"))
_OTHERS = tuple(f"{_SDPA}{kind}" for kind in ("flash_attention_for_cpu", "fused_attention_overrideable"))

FORMULAS: dict[Any, Callable[..., int]] = {
    **dict.fromkeys(_packets("scaled_dot_product_attention", *_KERNELS, *_OTHERS), _attention),
    **dict.fromkeys(_packets(*(f"{name}_backward" for name in (*_KERNELS, *_OTHERS))), _attention_backward),
    **dict.fromkeys(_packets("mm", "bmm"), _product),
    **dict.fromkeys(_packets("mv", "dot", "vdot", "matmul"), _matmul),
    **dict.fromkeys(_packets("addmm", "baddbmm", "addbmm", "addmm_", "baddbmm_"), _add_product),
    **dict.fromkeys(_packets("addmv"), _add_vector),
    **dict.fromkeys(_packets("linear"), _linear),
    **dict.fromkeys(_packets("_grouped_mm", "_scaled_grouped_mm"), _grouped_matmul),
}
"""Operations by the arguments. `linear`, `matmul` and `scaled_dot_product_attention` are dispatched whole only in
inference mode."""


NAMES = {
    "flash attention": "flash_attention",
    "cuDNN attention": "cudnn_attention",
    "other attention": "attention",
    "optimizer": "^_fused_(adam|adamw|sgd|adagrad)_$",
    "normalization": "(layer|rms)_?norm",
    "loss": "softmax|nll_loss|cross_entropy",
    "lookup": "^(embedding|index|gather|take|scatter|_index_put)",
}
"""The class by what an operator's name has, the first that fits. In no other are matrix products, then the rest."""


class Use(NamedTuple):
    """What an operator does with one of its arguments, a tensor or a list of tensors."""

    place: int
    name: str
    read: bool
    written: bool


class Rule(NamedTuple):
    """How to compute an operator's work from its arguments.

    `plain`: it reads all tensors among its arguments, which are the first `last` + 1, and writes what it returns.
    """

    uses: tuple[Use, ...] = ()
    plain: bool = False
    last: int = 0
    makes: bool = False  # it returns new memory
    may_copy: bool = False  # it returns a view, or a copy if no view is possible
    takes: bool = False
    puts: int | None = None
    adds: bool = False
    picks: bool = False  # it reads one element of each row
    flops: Callable[..., int] | None = None
    kind: int = CLASSES.index("elementwise")


UNKNOWN = Rule()
"""The rule of an operator that runs other operators, such as `torch.cond`: its work is not known."""


class Traits:
    """What is the same in every call of an operator."""

    __slots__ = ("call", "collective", "copies", "func", "name", "question", "rule", "transfer", "view")

    def __init__(self, func: Any) -> None:
        plain = type(func) is OpOverload
        self.func, self.name = func, func.__name__
        self.call = func._op if plain else func  # without the frame that an OpOverload adds to each call
        self.question = func.namespace == "prim"  # about a tensor, such as its device
        self.collective = func.namespace in COLLECTIVES and self.name.partition(".")[0] not in POINT_TO_POINT
        self.transfer = kind_of(func._schema.name) if isinstance(func, OpOverload) else None
        self.copies = COPIES.get(func._overloadpacket) if plain else None
        try:
            self.view, self.rule = views(func), rule_of(func)
        except Exception:  # an unforeseen schema must not stop the run
            self.view, self.rule = False, UNKNOWN


traits_by_id: dict[int, Traits] = {}
"""By the operator's id, as hashing an operator calls Python. Each keeps its operator, so that no id comes twice."""


def traits_of(func: Any) -> Traits:
    """The traits of `func`."""
    traits = traits_by_id.get(id(func))
    if traits is None:
        traits = traits_by_id[id(func)] = Traits(func)
    return traits


def views(func: Any) -> bool:
    """Whether `func` allocates no storage: everything it returns lies in its arguments."""
    if not isinstance(func, OpOverload):
        return False
    aliases = [value.alias_info is not None for value in func._schema.returns]
    return bool(aliases) and all(aliases) and func._overloadpacket not in MEMORY and not _composite(func)


def _composite(func: OpOverload) -> bool:
    return func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def rule_of(func: Any) -> Rule | None:
    """The rule of `func`, from its schema. None if it moves nothing."""
    if not isinstance(func, OpOverload):
        return UNKNOWN
    packet, aliases = func._overloadpacket, [each.alias_info is not None for each in func._schema.returns]
    if func.namespace in COLLECTIVES or packet in NOTHING:
        return None
    uses = tuple(_uses(func))
    may_copy = bool(aliases) and all(aliases) and not any(use.written for use in uses)
    if may_copy and not _composite(func):
        return None
    if packet in PUTS:
        uses = tuple(use._replace(written=use.written and use.place > 0) for use in uses)
    if packet is _aten._fused_adamw_ or packet is _aten._fused_adam_:  # written only if they are scaled
        uses = tuple(use._replace(written=use.written and use.name != "grads") for use in uses)
    flops = _flops(packet)
    special = may_copy or packet in TAKES or packet in PUTS or packet is _aten.nll_loss_forward
    return Rule(
        tuple(use._replace(read=use.read and not may_copy) for use in uses),
        not special and _is_plain(func, uses),
        max((use.place for use in uses), default=-1),
        not any(aliases) and packet is not _aten.nll_loss_forward,
        may_copy,
        packet in TAKES,
        PUTS.get(packet),
        packet in ADDS,
        packet is _aten.nll_loss_forward,
        flops,
        CLASSES.index(_class_of(packet, flops is not None)),
    )


def _class_of(packet: Any, multiplies: bool) -> str:
    """The class of an operator. `multiplies`: it has operations."""
    name = packet._qualified_op_name.partition("::")[2]
    named = next((kind for kind, pattern in NAMES.items() if re.search(pattern, name)), None)
    return named or ("matmul" if multiplies else "elementwise")


def _is_plain(func: OpOverload, uses: Sequence[Use]) -> bool:
    """Whether `func` reads all its tensors, each an argument of its own, and writes one: the first, or a new one."""
    arguments, returns = func._schema.arguments, func._schema.returns
    if [str(each.type) for each in returns] != ["Tensor"]:
        return False
    written = [use.place for use in uses if use.written]
    return written == ([] if returns[0].alias_info is None else [0]) and all(
        use.read
        and not arguments[use.place].kwarg_only
        and str(arguments[use.place].type) in ("Tensor", "Optional[Tensor]")
        for use in uses
    )


def _uses(func: OpOverload) -> Iterator[Use]:
    """What `func` does with each argument that may have tensors."""
    packet = func._overloadpacket
    unread = {0} if packet in OVERWRITES or packet in TAKES or packet in PUTS else set()
    if packet in SHAPE_ONLY:
        unread.add(SHAPE_ONLY[packet])
    for place, argument in enumerate(func._schema.arguments):
        if "Tensor" in str(argument.type):
            written = argument.alias_info is not None and argument.alias_info.is_write
            overwritten = written and argument.kwarg_only  # out=
            yield Use(place, argument.name, place not in unread and not overwritten, written)


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
