"""What a phase has to do: operations counted, and bytes that its operators take and make.

Bytes are those of an operator's tensors, so they are at least what a device must move if nothing stays in its caches
from one operator to the next: an upper bound of the traffic, and a lower bound of nothing. A tensor given twice is read
once, one that is written over is not read, an expanded one is as small as what it repeats, and where an operator takes
some rows of a table it reads those. A view moves nothing, nor does an empty tensor; what ranks send each other is not
counted. Scratch inside a kernel is not seen.

Operations are those of matrix products, convolutions and attention, by `torch.utils.flop_counter`'s formulas and, where
it has none, the like. By its convention an addition and a multiplication are two, masked scores count as any, and
every other operator is 0.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.flop_counter import flop_registry

if TYPE_CHECKING:
    from harness.ledger.log import Where

_aten = torch.ops.aten


class Work(NamedTuple):
    """Floating-point operations, bytes read and written, and how often a model's forward began."""

    flops: int
    read: int
    written: int
    passes: int = 0


def _packets(*names: str) -> frozenset[Any]:
    return frozenset(getattr(_aten, name) for name in names if hasattr(_aten, name))


NOTHING = _packets(
    *("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("resize_", "set_", "record_stream", "is_same_size", "is_pinned", "_has_compatible_shallow_copy_type"),
    "_local_scalar_dense",  # the host reads a number
)
"""What moves nothing, beside all that only makes views."""

OVERWRITES = _packets(
    *("copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "exponential_", "bernoulli_"),
    *("zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"),
    *("new_zeros", "new_ones", "new_full"),
)
"""What looks at no value of its first tensor."""

TAKES = _packets("embedding", "index_select", "gather", "index", "take")
"""What reads as much of its first tensor as it makes."""

PUTS = {
    **dict.fromkeys(_packets("index_put_"), 2),
    **dict.fromkeys(_packets("index_copy_", "index_add_"), 3),
    **dict.fromkeys(_packets("scatter_", "scatter_add_", "scatter_reduce_"), 2),
}
"""What writes to as many elements of its first tensor as the argument at this place has."""
ADDS = _packets("index_add_", "scatter_add_", "scatter_reduce_")
"""Of those, what reads them too."""

SHAPE_ONLY = {_aten.nll_loss_backward: 1, _aten.nll_loss_forward: 0}
"""What takes at this place a tensor for its shape, or for one element of each row."""


def _attention(query: Any, key: Any, value: Any, *others: Any) -> int:
    """Scores, and their product with the values: as `sdpa_flop_count`, with fewer heads of keys than of queries too."""
    return sum(_products(query, key, value))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *others: Any) -> int:
    """Scores once more, and two products for each of the forward's: as `sdpa_backward_flop_count`."""
    scores, mixed = _products(query, key, value)
    return 3 * scores + 2 * mixed


def _products(query: Any, key: Any, value: Any) -> tuple[int, int]:
    pairs: int = 2 * prod(query.shape[:-1]) * key.shape[-2]
    return pairs * query.shape[-1], pairs * value.shape[-1]


def _linear(taken: Any, weight: Any, *others: Any) -> int:
    return int(2 * taken.numel() * weight.shape[0])


def _matmul(left: Any, right: Any, *others: Any) -> int:
    columns = right.shape[-1] if right.dim() > 1 else 1
    rows = left.shape[-2] if left.dim() > 1 else 1
    batch = prod(torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]))
    return int(2 * batch * rows * left.shape[-1] * columns)


def _grouped(left: Any, right: Any, *others: Any) -> int:
    """Each row meets one of the matrices, or each part of the inner dimension gives one."""
    groups = left.shape[0] if left.dim() == right.dim() == 3 else 1
    return int(2 * groups * left.shape[-2] * left.shape[-1] * right.shape[-1])


def _added(_: Any, left: Any, right: Any, *others: Any) -> int:
    return _matmul(left, right)


_SDPA = "_scaled_dot_product_"
_KERNELS = tuple(f"{_SDPA}{kind}" for kind in ("flash_attention", "efficient_attention", "cudnn_attention"))
_OTHERS = tuple(f"{_SDPA}{kind}" for kind in ("flash_attention_for_cpu", "fused_attention_overrideable"))

FORMULAS: dict[Any, Callable[..., int]] = {
    **dict.fromkeys(_packets("scaled_dot_product_attention", *_KERNELS, *_OTHERS), _attention),
    **dict.fromkeys(_packets(*(f"{name}_backward" for name in (*_KERNELS, *_OTHERS))), _attention_backward),
    **dict.fromkeys(_packets("mm", "bmm", "mv", "dot", "vdot", "matmul"), _matmul),
    **dict.fromkeys(_packets("addmm", "baddbmm", "addmv", "addbmm", "addmm_", "baddbmm_"), _added),
    **dict.fromkeys(_packets("linear"), _linear),
    **dict.fromkeys(_packets("_grouped_mm", "_scaled_grouped_mm"), _grouped),
}
"""By arguments. `linear`, `matmul` and `scaled_dot_product_attention` are seen whole only in inference mode."""


class _Rule(NamedTuple):
    """How an operator's work follows from its arguments. A place is a position or a name."""

    unread: frozenset[int | str]
    mutated: frozenset[int | str]
    makes: bool  # what it returns is new
    may_copy: bool  # it returns a view, or a copy where there can be none
    takes: bool
    puts: int | None
    adds: bool
    picks: bool  # one element of each row
    flops: Callable[..., int] | None


class Counter:
    """Adds up the work of operators on one kind of device, by where they ran."""

    def __init__(self, device_of: Callable[[torch.Tensor], str], device: str, where: "Where") -> None:
        self._device_of, self._device = device_of, device
        self._rules: dict[Any, _Rule | None] = {}
        self._done: dict[Where, list[int]] = {}
        self._unknown: set[Where] = set()
        self._off = False
        self.enter(where)

    def enter(self, where: "Where") -> None:
        """What follows is done in `where`."""
        self._where, self._here = where, self._done.setdefault(where, [0, 0, 0, 0])

    def of(self, where: "Where") -> Work | None:
        """What was done in `where`; None where not all of it was seen."""
        return None if where in self._unknown else Work(*self._done.get(where, (0, 0, 0)))

    def all(self) -> dict["Where", Work]:
        """What was done so far, everywhere."""
        return {where: Work(*done) for where, done in self._done.items()}

    def add(self, where: "Where", work: Work | None) -> None:
        """Count `work` as done in `where`; None: nobody knows how much it was."""
        if work is None:
            self._unknown.add(where)
        else:
            self._done[where][:] = map(sum, zip(self._done[where], work, strict=True))

    def passed(self) -> None:
        """A forward begins that is no part of another."""
        self._here[3] += 1

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within it nothing counts."""
        self._off = True
        try:
            yield
        finally:
            self._off = False

    def count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """`func` has made `out` of these."""
        try:
            rule = self._rules[func]
        except KeyError:
            rule = self._rules[func] = _rule(func)
        if rule is None or self._off:
            return
        read, written = self._moved(rule, args, kwargs or {}, out)
        here = self._here
        here[1] += read
        here[2] += written
        if rule.flops is not None and (read or written):
            here[0] += rule.flops(args, kwargs or {}, out)

    def _moved(self, rule: _Rule, args: Any, kwargs: Any, out: Any) -> tuple[int, int]:
        """Bytes read and written."""
        read = written = 0
        known: list[torch.Tensor] = []
        for place, argument in (*enumerate(args), *kwargs.items()) if kwargs else enumerate(args):
            if isinstance(argument, torch.Tensor):
                tensors: Any = (argument,)
            elif isinstance(argument, (list, tuple)):
                tensors = argument
            else:
                continue
            for tensor in tensors:
                if not isinstance(tensor, torch.Tensor) or any(tensor is each for each in known):
                    continue
                known.append(tensor)
                size = self._size(tensor)
                if place not in rule.unread:
                    read += size
                if place in rule.mutated:
                    written += size
        if rule.puts is not None:
            some = self._elements(args, rule.puts)
            written += some
            read += some if rule.adds else 0
        elif rule.picks:
            read += self._elements(args, 1)
        elif rule.makes:
            made = sum(map(self._size, _tensors(out)))
            written += made
            read += made if rule.takes else 0
        elif rule.may_copy and _apart(args[0], out):
            return self._size(args[0]), self._size(out)
        return read, written

    def _size(self, tensor: torch.Tensor) -> int:
        """Bytes of `tensor` in memory, what is repeated in it once; 0 on another device."""
        if self._device_of(tensor) != self._device:
            return 0
        try:
            stride = tensor.stride()
        except (NotImplementedError, RuntimeError):  # sparse and other layouts without strides
            return sum(self._size(part) for part in (tensor.indices(), tensor.values()))
        if 0 in stride and tensor.numel():
            return tensor.itemsize * prod(
                size for size, step in zip(tensor.shape, stride, strict=True) if step
            )
        return tensor.nbytes

    def _elements(self, args: Any, place: int) -> int:
        """Bytes of as many elements of the first argument as the one at `place` has."""
        whole, like = args[0], args[place] if place < len(args) else None
        if self._device_of(whole) != self._device:
            return 0
        return int(whole.itemsize * (like.numel() if isinstance(like, torch.Tensor) else 1))


def _rule(func: Any) -> _Rule | None:
    """The rule of `func`, by its schema; None where it moves nothing."""
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
        mutated -= {1, "grads"}  # written only where they are scaled
    return _Rule(
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
    """From what `packet` takes and makes to its operations; None where it has no formula."""
    own, theirs = FORMULAS.get(packet), flop_registry.get(packet)
    if own is not None:
        return lambda args, kwargs, out: own(*args)
    if theirs is not None:
        return lambda args, kwargs, out: int(theirs(*args, **kwargs, out_val=out))
    return _packed if packet in PACKED or _multiplies(packet._qualified_op_name) else None


PACKED = _packets(
    *(
        "_int_mm",
        "_scaled_mm_v2",
        "_weight_int8pack_mm",
        "_weight_int4pack_mm",
        "_weight_int4pack_mm_for_cpu",
    ),
    "_dyn_quant_matmul_4bit",
)
"""What multiplies with a weight in few bits, whose shape does not show."""


def _multiplies(name: str) -> bool:
    """Whether a library's own operator of this name does."""
    product = re.search("(_|::)(gemm|gemv|mm|matmul|linear)(_|$)", name)
    return product is not None and not re.search("^aten::|pack|backward", name)


def _packed(args: Any, kwargs: Any, out: Any) -> int:
    """Of a product from [..., into] to [..., out] by a weight that is packed."""
    taken = next((each for each in args if isinstance(each, torch.Tensor)), None)
    made = next(iter(_tensors(out)), None)
    if taken is None or made is None or not made.dim():
        return 0
    return int(2 * taken.numel() * made.shape[-1])


def _tensors(out: Any) -> list[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return [out]
    return [each for each in out if isinstance(each, torch.Tensor)] if isinstance(out, (tuple, list)) else []


def _apart(taken: Any, made: Any) -> bool:
    """Whether two tensors share no storage."""
    pair = isinstance(taken, torch.Tensor) and isinstance(made, torch.Tensor)
    return pair and taken.untyped_storage()._cdata != made.untyped_storage()._cdata
