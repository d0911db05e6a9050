"""What operators are counted to do, against formulas written out by hand; and what a rehearsal fills in."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harness.generation.batch import Requests
from harness.generation.decode import generate
from harness.ledger import Ledger, Work
from harness.ledger.op_cost import _multiplies
from harness.model.kv_cache import attention_flops_per_position
from harness.rehearsal.extrapolation import Alike, missing

F32, I64 = 4, 8
LAYERS, HEADS, KV_HEADS, WIDTH, HIDDEN, WORDS = 2, 4, 2, 16, 64, 128


def done(act: Callable[[], object]) -> Work:
    """What `act` is counted to do."""
    with Ledger(device="cpu") as ledger, ledger.phase("act"):
        act()
    return worked(ledger, "act")


def worked(ledger: Ledger, phase: str) -> Work:
    """What was done in the one phase of that name."""
    (actual,) = [each.work for each in ledger.phases if each.where.phase == phase]
    assert actual is not None
    return actual


def figures(work: Work) -> tuple[int, int, int, int]:
    """All operations, bytes read and written, and forward calls."""
    return work.flops, work.read, work.written, work.forward_calls


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": HIDDEN, "intermediate_size": 176, "vocab_size": WORDS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, num_hidden_layers=LAYERS)).eval()


def matrices(model: LlamaForCausalLM) -> int:
    """Elements of the matrices that each token is multiplied by."""
    return sum(each.weight.numel() for each in model.modules() if isinstance(each, torch.nn.Linear))


def test_a_linear_layer_is_two_operations_for_each_weight_and_row_and_twice_that_backward() -> None:
    layer, rows = torch.nn.Linear(5, 7), torch.randn(3, 5, requires_grad=True)
    with Ledger(device="cpu") as ledger:
        with ledger.phase("forward"):
            result = layer(rows)
        with ledger.phase("backward"):
            result.backward(torch.ones_like(result))
    assert figures(worked(ledger, "forward")) == (2 * 3 * 5 * 7, F32 * (15 + 35 + 7), F32 * 21, 1)
    assert worked(ledger, "backward").flops == 2 * worked(ledger, "forward").flops


def test_work_is_counted_by_the_class_of_the_operator() -> None:
    table, some = torch.randn(10, 4, requires_grad=True), torch.tensor([1, 2, 1])
    norm, product = torch.nn.LayerNorm(4), torch.nn.Linear(4, 6)
    step = torch.optim.AdamW([table], fused=True)
    with Ledger(device="cpu") as ledger:
        with ledger.phase("act"):
            rows = norm(torch.nn.functional.embedding(some, table))
            heads = rows.view(1, 1, 3, 4)
            attended = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
            torch.nn.functional.cross_entropy(product(attended.view(3, 4)), some).backward()
        with ledger.phase("step"):
            step.step()
    by_class = worked(ledger, "act").by_class
    assert list(by_class) == ["matmul", "flash attention", "normalization", "loss", "lookup", "elementwise"]
    assert [by_class["matmul"].flops, by_class["flash attention"].flops] == [
        3 * 2 * 3 * 4 * 6,
        (4 + 10) * 9 * 4,
    ]
    assert by_class["loss"].calls == 4  # log_softmax, nll_loss, and the backward of each
    (update,) = [part for name, part in worked(ledger, "step").by_class.items() if name == "optimizer"]
    assert (update.read, update.written, update.calls) == (F32 * (4 * 40 + 1), F32 * 3 * 40, 1)


TABLE, SOME = torch.zeros(100, 8), torch.tensor([3, 50])
ROWS = torch.ones(2, 8)


@pytest.mark.parametrize(
    ("act", "read", "written"),
    [
        (lambda: torch.nn.functional.embedding(SOME, TABLE), 2 * I64 + 2 * 8 * F32, 2 * 8 * F32),
        (lambda: TABLE.index_select(0, SOME), 2 * I64 + 2 * 8 * F32, 2 * 8 * F32),
        (lambda: TABLE[SOME], 2 * I64 + 2 * 8 * F32, 2 * 8 * F32),
        (lambda: TABLE.gather(0, SOME.view(2, 1)), 2 * I64 + 2 * F32, 2 * F32),
        (lambda: TABLE.index_copy_(0, SOME, ROWS), 2 * I64 + 2 * 8 * F32, 2 * 8 * F32),
        (lambda: TABLE.index_add_(0, SOME, ROWS), 2 * I64 + 2 * 2 * 8 * F32, 2 * 8 * F32),
        (lambda: TABLE[:2].copy_(ROWS), 2 * 8 * F32, 2 * 8 * F32),
        (lambda: TABLE.zero_(), 0, 800 * F32),
        (lambda: TABLE.add_(1), 800 * F32, 800 * F32),
        (lambda: torch.mul(TABLE, TABLE), 800 * F32, 800 * F32),
        (lambda: torch.mul(TABLE, TABLE, out=torch.empty(100, 8)), 800 * F32, 800 * F32),
        (lambda: torch.cat([TABLE, ROWS]), 816 * F32, 816 * F32),
        (lambda: TABLE.t()[:4].unsqueeze(0).expand(9, 4, 100), 0, 0),
        (lambda: torch.empty(9, 9), 0, 0),
        (lambda: torch.zeros_like(TABLE), 0, 800 * F32),
        (lambda: TABLE[0].expand(100, 8).clone(), 8 * F32, 800 * F32),
    ],
)
def test_bytes_are_of_what_an_operator_touches(act: Callable[[], object], read: int, written: int) -> None:
    assert figures(done(act)) == (0, read, written, 0)


def test_what_is_on_another_device_does_not_count() -> None:
    assert done(lambda: torch.ones(4, 4, device="meta") @ torch.ones(4, 4, device="meta")) == Work()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_counts_every_head_of_queries_in_kernel_and_by_hand(kv_heads: int) -> None:
    query, key = torch.randn(3, 4, 5, 16), torch.randn(3, kv_heads, 11, 16)
    attend = partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
    assert done(lambda: attend(query, key, key)).flops == 2 * 2 * 3 * 4 * 5 * 11 * 16


def test_backward_of_attention_is_five_products_to_the_forwards_two() -> None:
    query, key, value = (torch.randn(1, 2, 6, 16, requires_grad=True) for _ in range(3))
    result = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert done(lambda: result.backward(torch.ones_like(result))).flops == 5 * 2 * 2 * 6 * 6 * 16


def test_inference_mode_does_what_no_grad_does() -> None:
    model, tokens = small_model(), torch.ones(2, 9, dtype=torch.int64)
    act = partial(model, input_ids=tokens, use_cache=False)
    with torch.no_grad():
        plain = done(act)
    with torch.inference_mode():
        assert done(act).flops == plain.flops


def test_a_forward_of_a_model_is_two_operations_for_each_weight_and_token_and_attention() -> None:
    model, tokens = small_model(), torch.ones(2, 9, dtype=torch.int64)
    attention = LAYERS * 2 * 2 * 2 * HEADS * 9 * 9 * WIDTH
    with Ledger(model=model) as ledger:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
    forward, backward = worked(ledger, "forward").flops, worked(ledger, "backward").flops
    assert forward == 2 * matrices(model) * 18 + attention
    assert backward == 2 * 2 * matrices(model) * 18 + 5 * attention // 2


def test_what_backward_computes_again_counts_in_backward() -> None:
    actual = {}
    for again in (False, True):
        model, tokens = small_model().train(), torch.ones(2, 9, dtype=torch.int64)
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with Ledger(model=model) as ledger:
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        actual[again] = worked(ledger, "forward").flops, worked(ledger, "backward").flops
    (forward, backward), (same, more) = actual[False], actual[True]
    assert same == forward
    layers = forward - 2 * HIDDEN * WORDS * 18
    assert backward < more <= backward + layers


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_does_two_operations_for_each_weight_and_token_and_attends_to_what_is_cached(
    cache: str,
) -> None:
    model, prompts, new = small_model(), [[1, 2, 3], [4, 5, 6]], 5
    with Ledger(model=model) as ledger:
        generate(model, Requests(prompts, [new] * 2), cache=cache, ledger=ledger)
    known = [3 + token for token in range(1, new)] if cache == "dynamic" else [3 + new - 1] * (new - 1)
    attention = sum(LAYERS * 2 * 2 * 2 * HEADS * positions * WIDTH for positions in known)
    position = attention_flops_per_position(model.config)
    assert position is not None
    assert attention == 2 * sum(known) * position
    assert worked(ledger, "decode").flops == 2 * matrices(model) * 2 * (new - 1) + attention


@pytest.mark.parametrize("batch", [1, 3])
def test_a_dynamic_cache_is_read_twice_and_written_once_for_each_token(batch: int) -> None:
    model = small_model()
    position = batch * 2 * LAYERS * KV_HEADS * WIDTH * F32

    def token(length: int) -> Work:
        with Ledger(model=model) as ledger:
            generate(model, Requests([[1] * length] * batch, [2] * batch), ledger=ledger)
        return worked(ledger, "decode")

    short, long = token(3), token(4)
    assert short.read > matrices(model) * F32
    assert (long.read - short.read, long.written - short.written) == (2 * position, position)


def test_what_is_not_seen_is_not_measured() -> None:
    with Ledger(device="cpu") as ledger, ledger.phase("act"), ledger.opaque("program"):
        torch.ones(3, 3) @ torch.ones(3, 3)
    assert [each.work for each in ledger.phases if each.where.phase == "act"] == [None]


def test_tokens_left_out_take_what_the_polynomial_through_the_others_says() -> None:
    def take(number: int) -> Work:
        return Work([7 + 3 * number, 5 * number * number, 11, *[0] * (len(Work()) - 3)])

    everything = [take(number) for number in range(20)]
    seen = {number: everything[number] for number in (0, 1, 2, 3, 16, 17, 18, 19)}
    between = Work(sum(values) for values in zip(*everything[4:16], strict=True))
    assert missing(seen, 20) == between
    assert missing({**seen, 0: Work(), 19: Work([1] * len(Work()))}, 20) == between
    assert missing({**seen, 17: Work([1] * len(Work()))}, 20) is None


@pytest.mark.parametrize(("bend", "whole"), [(0, True), (1, False)])
def test_forwards_left_out_between_alike_ones_take_what_the_line_through_those_says(
    bend: int, whole: bool
) -> None:
    sizes = [10 + 3 * number + bend * number**2 for number in range(6)]
    with Ledger(device="cpu") as ledger, ledger.phase("decode"):
        alike = Alike(ledger)
        for number, size in enumerate(sizes):
            if number in (2, 3, 4):
                alike.leave_out()
            else:
                alike.make(lambda size=size: torch.ones(size), number)  # type: ignore[misc]
    actual = [each.work for each in ledger.phases if each.where.phase == "decode"]
    assert [each and figures(each) for each in actual] == [(0, 0, F32 * sum(sizes), 0) if whole else None]


def test_forwards_left_out_before_others_are_not_counted_as_none() -> None:
    with Ledger(device="cpu") as ledger, ledger.phase("decode"):
        alike = Alike(ledger)
        alike.make(lambda: torch.ones(3), 0)
        alike.make(lambda: torch.ones(3), 1)
        alike.leave_out()
        alike.make(lambda: torch.ones(3), 0)  # of other requests
    assert [each.work for each in ledger.phases if each.where.phase == "decode"] == [None]


@torch.library.custom_op("library::gemm_4bit", mutates_args=())
def gemm_4bit(taken: torch.Tensor, packed: torch.Tensor, out: int) -> torch.Tensor:
    """A product of a library's own, with a weight in half bytes."""
    return taken.new_zeros(*taken.shape[:-1], out)


def test_a_product_with_a_packed_weight_counts_as_one_with_the_whole() -> None:
    taken, packed = torch.ones(3, 5, 16), torch.zeros(8 * 16 // 2, 1, dtype=torch.uint8)
    left, right = torch.ones(32, 16, dtype=torch.int8), torch.ones(16, 8, dtype=torch.int8)
    assert done(lambda: gemm_4bit(taken, packed, 8)).flops == 2 * 3 * 5 * 16 * 8
    assert done(lambda: torch._int_mm(left, right)).flops == 2 * 32 * 16 * 8


@pytest.mark.parametrize(
    ("name", "multiplies"),
    [
        ("bitsandbytes::gemm_4bit", True),
        ("bitsandbytes::int8_mixed_scaled_mm", True),
        ("gptqmodel::gemm_int4_qzero_group_scaled_cpu_forward", True),
        ("quanto::qbytes_mm", True),
        ("quantized::linear_prepack", False),
        ("library::linear_backward", False),
        ("library::comm", False),
        ("aten::linalg_matmul", False),
    ],
)
def test_a_librarys_products_are_known_by_their_names(name: str, multiplies: bool) -> None:
    assert _multiplies(name) == multiplies


@pytest.mark.parametrize(
    ("sparse", "indices"), [(torch.Tensor.to_sparse, 2 * 3), (torch.Tensor.to_sparse_csr, 4 + 3)]
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_of_a_sparse_tensor_the_indices_and_the_values_move(
    sparse: Callable[[torch.Tensor], torch.Tensor], indices: int
) -> None:
    diagonal = sparse(torch.eye(3))
    nbytes = indices * I64 + 3 * F32
    assert figures(done(lambda: diagonal * 2.0)) == (0, nbytes, nbytes, 0)
