"""`harness.rehearse`: any PyTorch program on a card that is not there, and the machine as it was afterwards."""

import copy
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import harness
from harness.ledger.unseen import NotSeen
from harness.rehearsal.from_outside import FromOutside
from harness.rehearsal.known_values import NeedsValue

SMALL_WORKSPACE = 8_519_680
"""cuBLAS's workspace before Hopper: :4096:2:16:8 in KiB, CublasHandlePool.cpp."""


STATE = nn.Linear(2, 2).state_dict()
"""Of a model from before any rehearsal."""


def rounded(nbytes: int) -> int:
    """As a card's allocator does."""
    return -(-nbytes // 512) * 512


# the card


def test_a_program_sees_the_card() -> None:
    with harness.rehearse("rtx4090"):
        assert torch.cuda.is_available()
        assert torch.cuda.device_count() == 1
        assert torch.cuda.get_device_name() == "rtx4090"
        assert torch.cuda.get_device_capability() == (8, 9)
        assert torch.cuda.get_device_properties(0).total_memory == 24_207 * 2**20
        assert torch.accelerator.current_accelerator() == torch.device("cuda")
    assert torch.cuda.is_available() == (torch.cuda.device_count() > 0)


@pytest.mark.parametrize(
    "place",
    [
        lambda: torch.ones(3, device="cuda"),
        lambda: torch.ones(3, device="cuda:0"),
        lambda: torch.ones(3, device=torch.device("cuda")),
        lambda: torch.ones(3).cuda(),
        lambda: torch.ones(3).to("cuda"),
        lambda: torch.ones(3).to(torch.ones(1, device="cuda")),
        lambda: torch.ones(3, device="cuda").to("cuda"),
        lambda: torch.ones(3, device="cuda").half(),
        lambda: torch.tensor([1.0, 2.0], device="cuda"),
        lambda: torch.as_tensor([1.0], device="cuda"),
        lambda: torch.ones(2, device="cuda").new_zeros(3),
        lambda: torch.zeros_like(torch.ones(2, device="cuda")),
        lambda: nn.Linear(2, 2, device="cuda").weight,
        lambda: nn.Linear(2, 2).cuda().weight,
        lambda: nn.Linear(2, 2).to("cuda", torch.bfloat16).weight,
        lambda: torch.randn(3, generator=torch.Generator("cuda"), device="cuda"),
    ],
)
def test_a_tensor_is_on_the_card_however_it_got_there(place: Callable[[], Tensor]) -> None:
    with harness.rehearse("rtx4090"):
        tensor = place()
        assert tensor.device == torch.device("cuda", 0)
        assert tensor.is_cuda
        assert not tensor.is_cpu
        assert torch.cuda.memory_allocated() >= 512


def test_a_tensor_that_is_there_already_is_the_same() -> None:
    with harness.rehearse("rtx4090"):
        tensor = torch.ones(3, device="cuda")
        assert tensor.to("cuda") is tensor
        assert tensor.cuda() is tensor
        assert tensor.to(torch.float32) is tensor
        assert tensor.to("cuda", copy=True) is not tensor


def test_what_stays_on_the_host_is_the_host_s() -> None:
    with harness.rehearse("rtx4090") as ledger:
        tensor = torch.ones(1000)
        assert tensor.device == torch.device("cpu")
        assert torch.cuda.memory_allocated() == 0
    assert ledger.peak.bytes == 0
    assert ledger.host.peak.bytes == 4000


def test_operands_on_two_devices_are_refused_as_on_a_gpu() -> None:
    with harness.rehearse("rtx4090"), pytest.raises(Exception, match=r"cuda:0(,| and) cpu"):
        torch.ones(3, device="cuda") + torch.ones(3)


def test_a_second_card_is_not_there() -> None:
    with harness.rehearse("rtx4090"), pytest.raises(RuntimeError, match="a rehearsal has one card, cuda:0"):
        torch.cuda.set_device(1)


def test_a_rehearsal_inside_another_is_refused() -> None:
    twice = pytest.raises(RuntimeError, match="end that rehearsal first")
    with harness.rehearse("rtx4090"), twice, harness.rehearse("rtx4090"):
        pass


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"hardware": "h100"}, "hardware=h100: no page of a GPU has that name; one of a100-40gb"),
        ({"hardware": "cpu"}, "hardware=cpu: no page of a GPU has that name"),
        (
            {"hardware": "rtx4090", "allocator": "expandable:True"},
            "expandable:True: the CUDA allocator has no such",
        ),
    ],
)
def test_what_is_none_is_refused_by_a_sentence(words: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence), harness.rehearse(**words):
        pass


# figures


def test_the_figures_of_torch_cuda_are_those_of_the_card() -> None:
    with harness.rehearse("rtx4090") as ledger:
        tensors = [torch.empty(2**20 + 1, dtype=torch.uint8, device="cuda") for _ in range(3)]
        assert torch.cuda.memory_allocated() == 3 * (2**20 + 512)
        assert torch.cuda.memory_reserved() == 20 * 2**20
        free, total = torch.cuda.mem_get_info()
        assert free == total - 20 * 2**20
        tensors.clear()
        assert torch.cuda.memory_allocated() == 0
        assert torch.cuda.max_memory_allocated() == 3 * (2**20 + 512)
        torch.cuda.reset_peak_memory_stats()
        assert torch.cuda.max_memory_allocated() == 0
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == 0
    assert ledger.peak.allocated == 3 * (2**20 + 512)
    assert ledger.peak.reserved == 20 * 2**20
    assert ledger.fits


def test_what_does_not_fit_is_named_and_the_rest_goes_on() -> None:
    with harness.rehearse("rtx4090") as ledger:
        small = torch.empty(2**30, dtype=torch.uint8, device="cuda")
        large = torch.empty(2**35, dtype=torch.uint8, device="cuda")
        after = torch.empty_like(small)
    assert not ledger.fits
    assert ledger.exhausted is not None
    assert ledger.exhausted.nbytes == 2**35
    assert ledger.peak.allocated == small.nbytes + large.nbytes + after.nbytes


class Block(nn.Module):
    """A pre-norm MLP with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) to the same."""
        result: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return result


def train(device: str, steps: int = 2) -> None:
    """Two steps of AdamW in operators on lists, as on a GPU."""
    model = nn.Sequential(*(Block(64) for _ in range(3))).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    for _ in range(steps):
        x = torch.randn(4, 16, 64, device=device)
        F.mse_loss(model(x), x).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_parameters_gradients_and_optimizer_are_those_of_a_run_here_rounded_as_on_a_card() -> None:
    with harness.rehearse("rtx4090") as card:
        train("cuda")
    with harness.Ledger(discover=True, block=512) as here:
        train("cpu")
    for category in ("parameters", "gradients"):
        assert card.categories[category].peak == here.categories[category].peak, category
    steps = 18 * 512  # of each parameter the number of its steps, which AdamW has on the host
    assert card.categories["optimizer"].peak == (here.categories["optimizer"].peak or 0) - steps
    own_of_lt = 0 if int(torch.__version__.split(".")[1]) >= 12 else 2**20
    assert card.peak.categories["kernel"] == 2 * SMALL_WORKSPACE + own_of_lt


def test_the_same_program_has_the_same_bytes() -> None:
    peaks = []
    for _ in range(2):
        with harness.rehearse("rtx4090") as ledger:
            train("cuda")
        peaks.append((ledger.peak, ledger.memory.peak_reserved))
    assert peaks[0] == peaks[1]


def test_each_thread_of_a_gpu_s_program_has_a_workspace_by_name() -> None:
    with harness.rehearse("rtx4090") as ledger:
        weight = torch.ones(8, 8, device="cuda", requires_grad=True)
        with torch.no_grad():
            weight @ weight
        assert torch.cuda.memory_allocated() == 512 + SMALL_WORKSPACE
        (weight @ weight).sum().backward()
    names = {holding.name: holding.bytes for holding in ledger.peak.holdings if holding.category == "kernel"}
    assert names["cuBLAS workspace of the forward's thread"] == SMALL_WORKSPACE
    assert names["cuBLAS workspace of the backward's thread"] == SMALL_WORKSPACE


def test_a_stream_has_segments_of_its_own() -> None:
    with harness.rehearse("rtx4090"):
        torch.empty(2**21, dtype=torch.uint8, device="cuda")
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.empty(2**21, dtype=torch.uint8, device="cuda")
        assert torch.cuda.memory_reserved() == 2 * 20 * 2**20


# what a GPU does otherwise


def saved_by(
    call: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> int:
    """Bytes that are alive after a forward beside its input and its result."""
    with harness.rehearse("rtx4090"):
        x = torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)
        result = call(x)
        return torch.cuda.memory_allocated() - rounded(x.nbytes) - rounded(result.nbytes)


def test_dropout_keeps_a_mask_of_booleans() -> None:
    assert saved_by(lambda x: F.dropout(x, 0.5), (64, 64)) == 64 * 64


def test_the_fused_norm_keeps_one_number_a_row() -> None:
    assert saved_by(lambda x: F.rms_norm(x, (1024,)), (256, 1024)) == 256 * 4


def test_softmax_to_float32_is_one_kernel_for_float16_and_two_for_bfloat16() -> None:
    half, brain = (
        saved_by(lambda x: F.softmax(x, -1, dtype=torch.float32), (256, 256), dtype)
        for dtype in (torch.float16, torch.bfloat16)
    )
    assert half == 0
    assert brain == 0  # its copy to float32 is not kept either: softmax's backward needs its result alone


def test_flash_attention_keeps_one_number_a_query_and_the_seed() -> None:
    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    saved = saved_by(attend, (2, 4, 128, 64), torch.bfloat16)
    assert saved == 2 * 4 * 128 * 4 + 2 * 512  # log-sum-exp, and the two tensors of the generator's state


def test_autocast_casts_what_a_gpu_casts() -> None:
    with harness.rehearse("rtx4090"):
        layer, x = nn.Linear(8, 8, device="cuda"), torch.randn(2, 8, device="cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
            assert (x @ x.t()).dtype == torch.bfloat16
            assert F.layer_norm(layer(x), (8,)).dtype == torch.float32
            assert layer(x).softmax(-1).dtype == torch.float32
            assert layer(x).sum().dtype == torch.float32
            assert (x + layer(x)).dtype == torch.float32
        assert layer(x).dtype == torch.float32


def test_autocast_keeps_the_cast_of_a_weight_until_it_ends() -> None:
    with harness.rehearse("rtx4090"):
        layer, x = nn.Linear(64, 64, bias=False, device="cuda"), torch.randn(2, 64, device="cuda")
        with torch.no_grad():
            layer(x)  # the workspace
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            for _ in range(3):
                layer(x).detach()
            assert torch.cuda.memory_allocated() - before == 64 * 64 * 2
        assert torch.cuda.memory_allocated() == before


def test_gradients_of_a_tensor_that_is_used_twice_are_added_in_place() -> None:
    with harness.rehearse("rtx4090"):
        x = torch.randn(2**18, device="cuda", requires_grad=True)
        doubled = x * 2
        loss = (doubled.exp() + doubled.sin()).sum()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss.backward()
        alive = torch.cuda.max_memory_allocated() - before
    assert (
        alive == 2 * x.nbytes + 512
    )  # two branches' gradients, not their sum beside them, and that of the loss


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=1.0, momentum=0.9),
        lambda parameters: torch.optim.AdamW(parameters, fused=True),
        lambda parameters: torch.optim.Adafactor(parameters),
        lambda parameters: torch.optim.RMSprop(parameters),
    ],
)
def test_optimizers_of_torch_step(optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
    with harness.rehearse("rtx4090") as ledger:
        model = nn.Linear(32, 32, device="cuda")
        steps = optimizer(model.parameters())
        for _ in range(2):
            model(torch.randn(2, 32, device="cuda")).sum().backward()
            steps.step()
    assert ledger.categories["optimizer"].peak


def test_a_scaler_takes_it_that_nothing_overflows() -> None:
    with harness.rehearse("rtx4090", assume=1.0):
        model, scaler = nn.Linear(8, 8, device="cuda"), torch.amp.GradScaler("cuda")
        optimizer = torch.optim.AdamW(model.parameters())
        with torch.autocast("cuda", dtype=torch.float16):
            loss = model(torch.randn(2, 8, device="cuda")).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.state


# values


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.mean()),
        lambda x: bool((x > 0).all()),
        lambda x: x.tolist(),
    ],
)
def test_a_value_that_is_read_is_refused_by_its_line(read: Callable[[Tensor], Any]) -> None:
    with harness.rehearse("rtx4090"):
        x = torch.randn(3, device="cuda")
        with pytest.raises(NeedsValue, match=r"test_program.py:\d+: a value of a tensor is read.*assume=1.0"):
            read(x)


def test_a_value_may_be_assumed() -> None:
    with harness.rehearse("rtx4090", assume=2.5):
        assert torch.randn(3, device="cuda").sum().item() == 2.5


def test_values_that_follow_from_shapes_are_known() -> None:
    with harness.rehearse("rtx4090"):
        positions = torch.arange(6, device="cuda").reshape(2, 3)
        assert positions.max().item() == 5
        assert torch.nonzero(positions > 3).shape == (2, 2)


def test_a_shape_that_depends_on_values_is_refused_by_its_line() -> None:
    with harness.rehearse("rtx4090"):
        x = torch.randn(3, device="cuda")
        with pytest.raises(
            NeedsValue, match=r"test_program.py:\d+: the shape of the result of nonzero depends"
        ):
            torch.nonzero(x)


# what was there before


def test_a_model_from_before_can_be_moved_and_is_as_it_was_afterwards() -> None:
    model = nn.Linear(4, 4)
    before = model.weight
    with harness.rehearse("rtx4090") as ledger:
        model.to("cuda")(torch.randn(2, 4, device="cuda")).sum().backward()
        assert model.weight.grad is not None
    assert ledger.categories["parameters"].peak == 2 * 512
    assert model.weight is before
    assert before.grad is None
    assert model(torch.ones(1, 4)).isfinite().all()


def test_a_model_from_before_is_not_trained() -> None:
    model = nn.Linear(4, 4)
    with (
        harness.rehearse("rtx4090"),
        pytest.raises(FromOutside, match=r"test_program.py:\d+: a tensor of shape"),
    ):
        model(torch.randn(2, 4))
    assert model.weight.grad is None


def test_a_tensor_from_before_is_not_written() -> None:
    tensor = torch.zeros(3)
    with harness.rehearse("rtx4090"), pytest.raises(FromOutside, match="add_ would change it"):
        tensor.add_(1)
    assert tensor.sum() == 0


def test_a_tensor_from_before_is_read_as_the_host_s() -> None:
    tensor = torch.ones(1000)
    with harness.rehearse("rtx4090") as ledger:
        moved = tensor.cuda()
        assert moved.device.type == "cuda"
    assert ledger.peak.bytes == 4096


def test_nothing_is_left_behind() -> None:
    names = ("torch.cuda.is_available", "torch.cuda.Stream", "torch.Generator", "torch.nn.Module._apply")
    before = [eval(name) for name in names]
    tensor = torch.ones(3, requires_grad=True)
    with suppress(LookupError), harness.rehearse("rtx4090"):
        torch.ones(2, device="cuda")
        raise LookupError
    assert [eval(name) for name in names] == before
    F.dropout(tensor.exp(), 0.5).sum().backward()
    assert type(torch.ones(1)) is Tensor
    assert tensor.grad is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_a_program_needs_neither_deepspeed_nor_transformers() -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('transformers', 'deepspeed', 'accelerate', 'datasets')))\n"
        "import harness, torch\n"
        "with harness.rehearse('rtx4090') as ledger: torch.ones(1000, device='cuda')\n"
        "assert ledger.peak.bytes == 4096"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_gap_is_warned_of_by_the_program_s_line() -> None:
    with pytest.warns(NotSeen, match="what kernels of nonzero take") as warned, harness.rehearse("rtx4090"):
        torch.nonzero(torch.arange(3, device="cuda"))
    assert [Path(each.filename).name for each in warned] == ["test_program.py"]


def test_a_compiled_model_is_rehearsed_as_it_is_written_and_that_is_said() -> None:
    said = pytest.warns(NotSeen, match="nothing is compiled in a rehearsal")
    with said, harness.rehearse("rtx4090") as ledger:
        model = torch.compile(nn.Linear(8, 8, device="cuda"))
        model(torch.ones(2, 8, device="cuda")).sum().backward()
    assert [gap.figures for gap in ledger.gaps] == ["all"]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: torch.ones(3, device="cuda:1"), "cuda:1 is not there: a rehearsal has one card"),
        (lambda: torch.cuda.CUDAGraph(), "a captured graph is not rehearsed"),
        (lambda: nn.parallel.DistributedDataParallel(nn.Linear(2, 2)), "rehearse the model itself"),
        (lambda: torch.ones(3, device="cuda").cpu().numpy(), r"test_program.py:\d+: numpy of a tensor needs"),
        (
            lambda: torch.allclose(torch.ones(3, device="cuda"), torch.ones(3, device="cuda")),
            r"test_program.py:\d+: aten.allclose.default",
        ),
        (lambda: f"{torch.ones((), device='cuda'):.3f}", r"test_program.py:\d+: a value of a tensor is read"),
    ],
)
def test_what_is_not_rehearsed_is_refused_by_a_sentence(call: Callable[[], Any], sentence: str) -> None:
    with harness.rehearse("rtx4090"), pytest.raises(RuntimeError, match=sentence):
        call()


@pytest.mark.parametrize(
    "program",
    [
        lambda: nn.DataParallel(nn.Linear(2, 2).cuda())(torch.ones(1, 2, device="cuda")),
        lambda: nn.Linear(2, 2, device="meta").to_empty(device="cuda")(torch.ones(1, 2, device="cuda")),
        lambda: nn.Linear(2, 2).cuda().load_state_dict(STATE),
        lambda: next(iter(DataLoader(TensorDataset(torch.ones(4, 2)), 2, shuffle=True, pin_memory=True)))[
            0
        ].cuda(),
        lambda: copy.deepcopy(nn.Linear(2, 2).cuda())(torch.ones(1, 2, device="cuda")),
        lambda: torch.cuda.memory_summary(),
        lambda: nn.LSTM(4, 4).cuda()(torch.ones(3, 1, 4, device="cuda")),
    ],
)
def test_common_programs_run(program: Callable[[], Any]) -> None:
    with harness.rehearse("rtx4090"):
        program()


def test_an_optimizer_from_before_is_refused_as_it_steps() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters())
    with harness.rehearse("rtx4090"):
        model.to("cuda")(torch.ones(1, 4, device="cuda")).sum().backward()
        with pytest.raises(FromOutside, match=r"test_program.py:\d+: Adam has parameters from before"):
            optimizer.step()


def test_an_optimizer_that_decides_by_values_is_refused() -> None:
    with harness.rehearse("rtx4090"):
        model = nn.Linear(4, 4, device="cuda")
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(torch.ones(1, 4, device="cuda")).sum()
            loss.backward()
            return loss

        with pytest.raises(NeedsValue, match="a value of a tensor is read"):
            optimizer.step(closure)


def test_the_figures_of_the_accelerator_are_those_of_the_card() -> None:
    with harness.rehearse("rtx4090"):
        tensor = torch.ones(1000, device="cuda")
        assert torch.accelerator.memory_allocated() == torch.cuda.memory_allocated() == rounded(tensor.nbytes)
        assert torch.accelerator.max_memory_reserved() == 2 * 2**20


def test_a_stream_may_be_entered_again_inside_itself() -> None:
    with harness.rehearse("rtx4090"):
        side = torch.cuda.Stream()
        with side, side:
            assert torch.cuda.current_stream() == side
        assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_an_empty_tensor_has_no_stream_to_be_recorded_on() -> None:
    with harness.rehearse("rtx4090"):
        torch.empty(0, device="cuda").record_stream(torch.cuda.Stream())


def test_the_first_allocation_without_room_stays_the_first() -> None:
    with harness.rehearse("rtx4090") as ledger:
        tensors = [torch.empty(2**33, dtype=torch.uint8, device="cuda") for _ in range(4)]
        torch.cuda.set_per_process_memory_fraction(0.5)
        tensors.append(torch.empty(2**21, dtype=torch.uint8, device="cuda"))
    assert ledger.exhausted is not None
    assert ledger.exhausted.nbytes == 2**33


def test_random_numbers_afterwards_are_those_of_a_program_without_a_rehearsal() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with harness.rehearse("rtx4090"):
        torch.manual_seed(7)
        torch.rand(5, device="cuda")
    assert torch.equal(torch.rand(3), expected)


def test_what_a_library_keeps_to_itself_is_named() -> None:
    with pytest.warns(NotSeen), harness.rehearse("rtx4090") as ledger:  # noqa: PT031
        x = torch.ones(4, 4, device="cuda")
        torch.linalg.svd(x)
        torch.fft.fft(x)
        nn.LSTMCell(4, 4, device="cuda")(x)
    (gap,) = ledger.gaps
    assert [name in gap.sentence for name in ("_linalg_svd", "_fft_r2c", "lstm_cell")] == [True] * 3


@pytest.mark.parametrize("assume", ["x", True])
def test_what_is_assumed_is_a_number(assume: Any) -> None:
    with pytest.raises(ValueError, match=r"a number, as 1\.0"), harness.rehearse("rtx4090", assume=assume):
        pass


def test_a_loader_s_workers_are_refused() -> None:
    loader = DataLoader(TensorDataset(torch.ones(4, 2)), num_workers=1)
    with (
        harness.rehearse("rtx4090"),
        pytest.raises(RuntimeError, match=r"\(num_workers=1\).*give num_workers=0"),
    ):
        next(iter(loader))


def test_a_parameter_is_one_before_its_module_is_called() -> None:
    with harness.rehearse("rtx4090") as ledger:
        model = nn.Linear(1024, 1024, bias=False, device="cuda").to(torch.bfloat16)
        model(torch.ones(1, 1024, device="cuda", dtype=torch.bfloat16))
    assert ledger.categories["parameters"].peak == 1024 * 1024 * (4 + 2)
    assert [each.name for each in ledger.peak.holdings if each.category == "parameters"] == ["weight"]


READS = {
    "item": lambda tensor: tensor.sum().item(),
    "tolist": lambda tensor: tensor.tolist(),
    "float": lambda tensor: float(tensor[0]),
    "bool": lambda tensor: bool((tensor > 0).all()),
}


@pytest.mark.parametrize("read", READS)
def test_a_value_that_is_read_in_inference_mode_is_none_either(read: str) -> None:
    with harness.rehearse("h100-sxm"), torch.inference_mode(), pytest.raises(NeedsValue, match="value"):
        READS[read](torch.ones(4, device="cuda"))


COPIES = {
    "to": (lambda tensor: tensor.to("cuda"), 16),
    "to another dtype": (lambda tensor: tensor.to("cuda", torch.float16), 8),
    "a module": (lambda tensor: nn.Linear(2, 2).to("cuda", torch.float16), 12),
    "type_as": (lambda tensor: tensor.type_as(torch.empty(1, device="cuda")), 16),
    "nowhere": (lambda tensor: tensor.to("cpu", torch.float16), 0),
}


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_copy_to_the_card_is_counted_however_it_arrives(mode: Any, copy: str) -> None:
    act, nbytes = COPIES[copy]
    with harness.rehearse("h100-sxm") as ledger, mode(), ledger.phase("act"):
        act(torch.ones(4))
    moved = [
        (kind.operation, payload)
        for where, amounts in ledger.traffic.amounts().items()
        for kind, (_, payload) in amounts.items()
        if where.phase == "act"
    ]
    assert moved == ([("host-to-device", nbytes)] if nbytes else [])
