"""Shims: the patches of a rehearsal, without which a fake world would fail, or take other bytes.

The stand-ins are in `tensor_shims.py`, `world_shims.py` and `zero_shims.py`. Where the original of one is gone or takes
other arguments, the error names it. If only its bytes change, the equality tests fail.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from harness.ledger.collective_kinds import METHODS
from harness.ledger.patch import (
    ACCELERATE,
    BITSANDBYTES,
    BUILTIN,
    DATA,
    DEEPSPEED,
    TORCH,
    TRANSFORMERS,
    Patch,
    patched,
)
from harness.ledger.patch_table import GROUP
from harness.rehearsal import tensor_shims, world_shims, zero_shims
from harness.rehearsal.card_tensors import CARD_SHIMS
from harness.rehearsal.cuda_shims import CUDA_SHIMS
from harness.runtime.imports import import_deepspeed

CPU = "deepspeed.accelerator.cpu_accelerator.CPU_Accelerator"
ZERO12 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
ZERO3 = "deepspeed.runtime.zero"
NOT_FAKE = "a real tensor becomes a second, fake one where an operator takes it"
ALONE = "there is no rank 0 to ask"
ONCE_A_RANK = "it works once for every rank, and its time would grow with the world"

APPLY = Patch(
    "torch.nn.Module",
    "_apply",
    "torch swaps fake parameters, which fails where anything refers to them weakly",
    TORCH,
    tensor_shims.apply_in_place,
)

SLICES = Patch("torch.Tensor", "narrow", ONCE_A_RANK, TORCH, zero_shims.narrow, unchecked=BUILTIN)

SHIMS = (
    APPLY,
    Patch(
        "transformers.utils.import_utils",
        "is_fake_tensor",
        "transformers takes another branch where it takes values to be unknown",
        TRANSFORMERS,
        tensor_shims.is_never_fake,
    ),
    Patch(
        "transformers.cache_utils.QuantoQuantizedLayer",
        "_quantize",
        "optimum-quanto packs no fake tensor",
        TRANSFORMERS,
        tensor_shims.quantize_fake_tensors,
    ),
    Patch(
        "torch._meta_registrations",
        "_meta_grouped_mm_common",
        "it rejects grouped products of fp32, which the kernels support",
        TORCH,
        tensor_shims.grouped_mm_of_any_dtype,
    ),
    Patch(
        "torch",
        "_is_all_true",
        "probabilities of fake tensors have no values to check",
        TORCH,
        tensor_shims.is_always_true,
        unchecked=BUILTIN,
    ),
    Patch("torch", "get_rng_state", NOT_FAKE, TORCH, tensor_shims.get_fake_rng_state),
    Patch("torch", "set_rng_state", NOT_FAKE, TORCH, tensor_shims.ignore_rng_state),
    Patch(
        CPU,
        "available_memory",
        "ZeRO-1 and 2 take another branch where this machine has little memory free",
        DEEPSPEED,
        world_shims.unlimited_memory,
    ),
    Patch(
        f"{ZERO3}.utils",
        "assert_lst_len_same_as_other_ranks",
        ALONE,
        DEEPSPEED,
        world_shims.assume_equal_lengths,
    ),
    Patch(
        "deepspeed.utils.nvtx",
        "enable_nvtx",
        "there is no profiler to mark ranges for, and each mark takes time",
        DEEPSPEED,
        world_shims.turned_off,
        unchecked=DATA,
    ),
    Patch(
        "accelerate.data_loader",
        "is_datasets_available",
        "it imports datasets to know one of theirs by, and a rehearsal has none",
        ACCELERATE,
        world_shims.is_not_available,
    ),
    Patch(f"{ZERO3}.utils", "get_lst_from_rank0", ALONE, DEEPSPEED, world_shims.assume_equal_lists),
    Patch(
        f"{ZERO3}.stage3",
        "reduce_scatter_coalesced",
        ONCE_A_RANK,
        DEEPSPEED,
        zero_shims.reduce_scatter_coalesced,
    ),
    Patch(
        f"{ZERO3}.partition_parameters.AllGatherCoalescedHandle",
        "wait",
        ONCE_A_RANK,
        DEEPSPEED,
        zero_shims.all_gather_wait,
    ),
    Patch(ZERO12, "average_tensor", ONCE_A_RANK, DEEPSPEED, zero_shims.average_tensor),
    Patch(
        ZERO12,
        "allreduce_and_copy_with_multiple_ranks",
        ONCE_A_RANK,
        DEEPSPEED,
        zero_shims.allreduce_and_copy,
    ),
    Patch(
        ZERO12,
        "initialize_gradient_partitioning_data_structures",
        ONCE_A_RANK,
        DEEPSPEED,
        zero_shims.gradient_partitioning_structures,
    ),
    Patch(
        ZERO12,
        "initialize_gradient_partition",
        ONCE_A_RANK,
        DEEPSPEED,
        zero_shims.initialize_gradient_partition,
    ),
    Patch(ZERO12, "get_first_param_index", ONCE_A_RANK, DEEPSPEED, zero_shims.get_first_param_index),
    Patch(
        "deepspeed.runtime.pipe.engine.PipelineEngine",
        "_recv_tensor_meta",
        "there is no earlier stage that would send it",
        DEEPSPEED,
        world_shims.receive_hidden_states,
    ),
    SLICES,
    *(
        Patch(
            GROUP,
            name,
            "a real message's tensors live as long as its handle",
            TORCH,
            world_shims.kept_by_its_work,
            unchecked=BUILTIN,
            optional=True,  # torch 2.13 has other names for some
        )
        for name in METHODS
    ),
)

PACKED_PARAMETER = Patch(
    "bitsandbytes.nn.modules.Params4bit",
    "__new__",
    "a tensor of this class cannot be fake",
    BITSANDBYTES,
    tensor_shims.packed_parameter,
)
"""It is replaced where a run packs weights so: importing bitsandbytes takes seconds."""

TWO_DEVICES = "DeepSpeed takes the host for its accelerator, and the rehearsal is for a GPU"

GPU_SHIMS = (
    Patch(CPU, "device_name", TWO_DEVICES, DEEPSPEED, world_shims.device_name),
    Patch(CPU, "current_device_name", TWO_DEVICES, DEEPSPEED, world_shims.current_device_name),
    Patch(CPU, "on_accelerator", TWO_DEVICES, DEEPSPEED, world_shims.on_accelerator),
)

ONE_WORLD = "it is kept from the first world of a process, and a rehearsal has another"


def process_world() -> tuple[Patch, ...]:
    """What DeepSpeed and accelerate keep of the world of this process, in globals; and `linear`, which ZeRO-3 replaces
    and never restores.
    """
    import_deepspeed()
    from deepspeed.utils import groups

    names = [name for name, value in vars(groups).items() if name.startswith("_") and name.isupper()]
    names = ["mesh_device", "mpu", *(name for name in names if not isinstance(getattr(groups, name), str))]
    return (
        Patch(
            "accelerate.state.PartialState",
            "_shared_state",
            ONE_WORLD,
            ACCELERATE,
            world_shims.cleared,
            unchecked=DATA,
        ),
        Patch("deepspeed.comm.comm", "cdb", ONE_WORLD, DEEPSPEED, world_shims.no_backend, unchecked=DATA),
        Patch(
            "deepspeed.accelerator.real_accelerator",
            "ds_accelerator",
            ONE_WORLD,
            DEEPSPEED,
            world_shims.new_accelerator,
            unchecked=DATA,
        ),
        Patch(
            "torch.nn.functional",
            "linear",
            "ZeRO-3 replaces it for good",
            TORCH,
            world_shims.original_linear,
            unchecked=BUILTIN,
        ),
        *(
            Patch("deepspeed.utils.groups", name, ONE_WORLD, DEEPSPEED, world_shims.cleared, unchecked=DATA)
            for name in names
        ),
    )


@contextmanager
def shimmed(gpu: bool = False) -> Iterator[None]:
    """Install every shim in this context; with `gpu` also those for a GPU. Raises DoesNotFit."""
    with patched(*SHIMS, *((*CUDA_SHIMS, *CARD_SHIMS, *GPU_SHIMS) if gpu else ()), *process_world()):
        yield


def program_shims() -> tuple[Patch, ...]:
    """The shims for any program: those for fake tensors, in torch and, if it is installed, in transformers."""
    packages = ("torch", "transformers") if find_spec("transformers") else ("torch",)
    return tuple(patch for patch in SHIMS if patch.package in packages and patch not in (APPLY, SLICES))
