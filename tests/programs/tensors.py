"""Tensors of every kind: nested, sparse, quantized, made of others, in anybody's memory."""

import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from harness import Ledger
from tests.programs import PROGRAMS, data, gradients, mlp, program, train


@program
def jagged(ledger: Ledger) -> Any:
    layer = mlp()[0]
    ledger.own(model=layer)
    rows: Any = torch.nested.nested_tensor([data(3), data(5)], layout=torch.jagged, requires_grad=True)
    layer(rows).values().sum().backward()
    return rows.grad.values(), gradients(layer)


@program
def nested(ledger: Ledger) -> Any:
    rows: Any = torch.nested.nested_tensor([data(3), data(5)], requires_grad=True)
    padded = (rows * 2).to_padded_tensor(0.0)
    padded.sum().backward()
    return padded, rows.grad.to_padded_tensor(0.0)


@program
def an_encoder_with_padding(ledger: Ledger) -> Any:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 1).eval()  # it nests its input
    ledger.own(model=model)
    padding = torch.tensor([[False] * 6 + [True] * 2])
    with torch.no_grad():
        return model(data()[None], src_key_padding_mask=padding)


def sparse_gradients(ledger: Ledger, make: Callable[[Iterator[nn.Parameter]], Any]) -> Any:
    torch.manual_seed(0)
    words = nn.Embedding(100, 8, sparse=True)
    optimizer = make(words.parameters())
    ledger.own(model=words, optimizer=optimizer)
    for _ in range(2):
        for _ in range(2):
            words(torch.tensor([1, 2, 3, 1])).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return words.weight.detach()


PROGRAMS["sparse_adam"] = partial(sparse_gradients, make=torch.optim.SparseAdam)
PROGRAMS["sparse_sgd"] = partial(sparse_gradients, make=partial(torch.optim.SGD, lr=0.1))


@program
def sparse_layouts(ledger: Ledger) -> Any:
    pairs, rows = data().relu().to_sparse(), data().relu().to_sparse_csr()
    return pairs @ data(16), rows @ data(16), pairs.coalesce().values(), rows.to_sparse_csc().row_indices()


@program
def quantized(ledger: Ledger) -> Any:
    each = torch.quantize_per_channel(data(), torch.ones(8) * 0.1, torch.zeros(8), 0, torch.qint8)
    return torch.quantize_per_tensor(data(), 0.1, 0, torch.qint8).relu().int_repr(), each.dequantize()


class Wrapper(Tensor):
    """A tensor that is only words about another, its `whole`."""

    whole: Tensor

    @staticmethod
    def __new__(cls, whole: Tensor) -> Any:
        result: Any = Tensor._make_wrapper_subclass(
            cls, whole.shape, dtype=whole.dtype, requires_grad=whole.requires_grad
        )
        result.whole = whole
        return result

    def __init__(self, whole: Tensor) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        def unwrapped(each: Any) -> Any:
            return each.whole if isinstance(each, Wrapper) else each

        result = func(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs or {}))
        return tree_map(lambda each: cls(each) if isinstance(each, Tensor) else each, result)


class Flat(Wrapper):
    def __tensor_flatten__(self) -> Any:
        return ["whole"], None

    @staticmethod
    def __tensor_unflatten__(parts: Any, context: Any, size: Any, stride: Any) -> Any:
        return Flat(parts["whole"])


@program
def a_wrapper(ledger: Ledger) -> Any:
    wrapped: Any = Wrapper(data())
    ledger.claim("inputs", "wrapped", wrapped)
    return (wrapped * 2 + 1).whole


@program
def parameters_that_wrap(ledger: Ledger) -> Any:
    layer: Any = nn.Linear(16, 4, bias=False)
    layer.weight = nn.Parameter(Flat(data(4)))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    ledger.own(model=layer, optimizer=optimizer)
    layer(data()).pow(2).sum().backward()
    optimizer.step()
    return layer.weight.whole.detach(), layer.weight.grad.whole


class Heard(Tensor):
    """Says whatever is asked of it."""

    asked: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.asked.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


@program
def tensors_that_hear_what_is_asked(ledger: Ledger) -> Any:
    Heard.asked.clear()
    model: Any = mlp()
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Heard))
    trained = train(ledger, model)
    model(data().as_subclass(Heard).requires_grad_() * 1).exp().sum().backward()
    return [each.as_subclass(Tensor) for each in trained], [
        re.sub(" at 0x.*", "", each) for each in Heard.asked
    ]


@program
def masked(ledger: Ledger) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is a prototype
        result: Any = torch.masked.masked_tensor(data(), data() > 0)
        return (result * 2).sum().get_data()


@program
def foreign_memory(ledger: Ledger) -> Any:
    rows = np.arange(100, dtype=np.float32)
    tensor = torch.from_numpy(rows)
    ledger.claim("inputs", "rows", tensor)
    return tensor.sum() + torch.utils.dlpack.from_dlpack(np.ones(9)).sum(), tensor.clone().share_memory_()


@program
def storages_resized_and_exchanged(ledger: Ledger) -> Any:
    one, two = torch.arange(100.0), torch.zeros(3)
    one.untyped_storage().resize_(0)
    one.untyped_storage().resize_(4000)
    one.set_(torch.arange(50.0))  # type: ignore[call-overload]
    two.data = torch.ones(7)
    raw: Any = torch.tensor([], dtype=torch.float32)
    raw.set_(torch.UntypedStorage(64), 0, (16,))
    return one, two.clone(), raw.fill_(3), torch.empty(0).resize_(10).fill_(1), torch.zeros(0, 5).sum()


@program
def complex_views(ledger: Ledger) -> Any:
    pairs = torch.view_as_complex(data(4).view(4, 8, 2))
    return pairs.conj() @ pairs.t(), pairs.conj().imag.neg().resolve_neg(), torch.fft.fft(data())
