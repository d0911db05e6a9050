"""Every patch of every room, in one list: what to look at where another release of a package is to be used."""

from harness.generation import paged_choosing
from harness.ledger import patch_table
from harness.ledger.patch import Patch
from harness.model import tensor_parallel
from harness.quantization import packed
from harness.rehearsal.card_tensors import CARD_SHIMS, COMPILE
from harness.rehearsal.cuda_shims import CUDA_SHIMS
from harness.rehearsal.shims import GPU_SHIMS, PACKED_PARAMETER, SHIMS, process_world
from harness.runtime import imports
from harness.training import compiled_layers, engine, head_loss, nonfinite, pipeline_engine


def every_patch() -> tuple[Patch, ...]:
    """All patches, each with its reason and the releases it was checked with."""
    rooms = (
        patch_table,
        imports,
        packed,
        tensor_parallel,
        compiled_layers,
        engine,
        head_loss,
        nonfinite,
        pipeline_engine,
        paged_choosing,
    )
    tables = [patch for room in rooms for patch in room.PATCHES.values()]
    return (
        *tables,
        *SHIMS,
        *CUDA_SHIMS,
        *CARD_SHIMS,
        COMPILE,
        PACKED_PARAMETER,
        *GPU_SHIMS,
        *process_world(),
    )
