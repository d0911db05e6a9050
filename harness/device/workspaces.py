"""The workspaces that PyTorch gives cuBLAS and cublasLt: allocated once per thread and stream, and kept.

From aten/src/ATen/cuda/CublasHandlePool.cpp. A handle belongs to one thread and one device, a workspace to a handle and
a stream: the thread of the forward and autograd's thread of the device have one each. It comes from the caching
allocator at the first call that takes the handle. By release of PyTorch:

| | 2.11 | 2.12, 2.13 |
| --- | --- | --- |
| 32 MiB at capability | 9.0 | 9.x, 10.x, 12.x (pytorch#175344; #182669, which would have undone it, was closed) |
| cublasLt's workspace | its own, beside cuBLAS's | cuBLAS's (pytorch#168175, #175879) |

Which release has a change follows from dates, not from a release's own source. From 2.14 on, 11.0 has 32 MiB too.
Rows of profiles/measured.md bear out cuBLAS's of both threads at 8.0, 8.6, 8.9 and 9.0, none the rest: unverified. With
older releases, of 2025, cublasLt had 1 MiB for each call.
"""

import os
import re
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch

from harness.device import capability as capabilities
from harness.ledger.cuda_allocator import BLOCK
from harness.ledger.reconcile import Libraries

Release = tuple[int, int]

_SMALL = 4096 * 1024 * 2 + 16 * 1024 * 8
_LARGE = 4096 * 1024 * 8
_LT_KIB = 1024

CUBLAS = frozenset(
    {
        *("mm", "addmm", "addmm_", "_addmm_activation", "bmm", "baddbmm", "baddbmm_", "addbmm", "addbmm_"),
        *("addmv", "addmv_", "mv", "dot", "vdot", "_scaled_mm", "_int_mm"),
        *("triangular_solve", "linalg_solve_triangular", "linalg_lu_solve"),
        *("_transformer_encoder_layer_fwd", "_native_multi_head_attention"),
        *("slow_conv3d_forward", "_slow_conv2d_forward", "_slow_conv2d_backward"),
        *("slow_conv_transpose2d", "slow_conv_transpose3d", "slow_conv_dilated2d", "slow_conv_dilated3d"),
    }
)
"""Operators that take a cuBLAS handle: aten/src/ATen/native/cuda/Blas.cpp, ScaledBlas.cpp, linalg/, Convolution*.cu.

`dot` of any type is among them. Convolutions of cuDNN and attention kernels are not, nor is `linalg_vector_norm`.
"""

LT_ALWAYS = frozenset({"_scaled_mm", "_int_mm"})
"""Operators that always run on cublasLt; `addmm` does under conditions: `addmm_on_lt`."""


class Workspace(NamedTuple):
    """Bytes of cuBLAS's workspace and of cublasLt's own; shared: cublasLt uses cuBLAS's instead."""

    cublas: int
    lt: int
    shared: bool


def workspace(capability: float, environ: Mapping[str, str], release: Release = (2, 13)) -> Workspace:
    """The workspaces of one thread and stream, in bytes, at a compute capability as 8.9."""
    cublas = workspace_bytes(capability, environ, release)
    lt = lt_workspace_bytes(capability, environ, release)
    return Workspace(cublas, lt, _flag(environ, "TORCH_CUBLASLT_UNIFIED_WORKSPACE", release >= (2, 12)))


def workspace_bytes(capability: float, environ: Mapping[str, str], release: Release = (2, 13)) -> int:
    """cuBLAS's workspace in bytes: `CUBLAS_WORKSPACE_CONFIG`, or the default of the card.

    The variable is pairs of KiB and counts, as ":4096:2:16:8". As in torch, text around a pair is passed over, and
    where there is no pair the default is used, with a warning.
    """
    default = _LARGE if _wants_large(capability, release) else _SMALL
    config = environ.get("CUBLAS_WORKSPACE_CONFIG")
    if config is None:
        return default
    pairs = re.findall(r":([0-9]+):([0-9]+)", config)
    if not pairs:
        warnings.warn(
            f"CUBLAS_WORKSPACE_CONFIG={config!r} has no :SIZE:COUNT; torch uses {default:,} bytes",
            stacklevel=2,
        )
        return default
    return sum(int(size) * 1024 * int(count) for size, count in pairs)


def _wants_large(capability: float, release: Release) -> bool:
    major = int(capability)
    if release <= (2, 11):
        return capability == 9.0
    return major in (9, 10, 12) or (major == 11 and release >= (2, 14))


def lt_workspace_bytes(capability: float, environ: Mapping[str, str], release: Release = (2, 13)) -> int:
    """cublasLt's workspace in bytes: `CUBLASLT_WORKSPACE_SIZE` in KiB, or 1 MiB.

    A number may be followed by text, as std::stoi reads it; what is none, or exceeds 32 bits, leaves the default, with
    a warning. At most as much as cuBLAS's, unless TORCH_CUBLASLT_UNIFIED_WORKSPACE is 0. Raises ValueError where it is
    negative then: torch would ask for nearly 2**64 bytes.
    """
    given = environ.get("CUBLASLT_WORKSPACE_SIZE")
    kib = _LT_KIB if given is None else _stoi(given)
    capped = _flag(environ, "TORCH_CUBLASLT_UNIFIED_WORKSPACE", True)
    cublas = workspace_bytes(capability, environ, release)
    if kib < 0:
        if not capped:
            raise ValueError(f"CUBLASLT_WORKSPACE_SIZE={given!r} is negative")
        return cublas
    return min(kib * 1024, cublas) if capped else kib * 1024


def _stoi(text: str) -> int:
    number = re.match(r"\s*([+-]?[0-9]+)", text)
    if number is None or not -(2**31) <= int(number[1]) < 2**31:
        warnings.warn(
            f"CUBLASLT_WORKSPACE_SIZE={text!r} is no number; torch uses {_LT_KIB} KiB", stacklevel=3
        )
        return _LT_KIB
    return int(number[1])


def _flag(environ: Mapping[str, str], name: str, default: bool) -> bool:
    """A flag as c10::utils::check_env reads it: 0 or 1; anything else leaves the default."""
    return {"0": False, "1": True}.get(environ.get(name, ""), default)


def uses_cublas(name: str) -> bool:
    """Whether an ATen operator, named without its overload, takes a cuBLAS handle where its result is not empty."""
    return name in CUBLAS


def addmm_on_lt(
    bias: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    beta: float,
    environ: Mapping[str, str],
    activation: bool = False,
) -> bool:
    """Whether `addmm` runs on cublasLt: isInputCompliesAddmmCudaLt of aten/src/ATen/native/cuda/Blas.cpp.

    A bias of one row is added in the epilogue; a matrix only where an activation is fused as well. beta must be 1, and
    the second factor more than one row and column. Not with DISABLE_ADDMM_CUDA_LT=1.
    """
    if environ.get("DISABLE_ADDMM_CUDA_LT") == "1" or beta != 1:
        return False
    fused = bias.is_contiguous() and bias.squeeze().dim() == 1 and bias.shape[-1] == second.shape[1]
    if not (fused or (activation and bias.dim() == 2)):
        return False
    floating = first.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return floating and min(second.shape) > 1


def recognized(capability: float, environ: Mapping[str, str], release: Release = (2, 13)) -> Libraries:
    """For a ledger: names a block that outlives the operator which took it, where cuBLAS keeps one of its bytes.

    The bytes are as the ledger rounds them on a GPU.
    """
    taken = workspace(capability, environ, release)
    sizes = (taken.lt, "cublasLt workspace"), (taken.cublas, "cuBLAS workspace")
    names = {-(-size // BLOCK) * BLOCK: name for size, name in sizes if size}

    def name_of(op: str, nbytes: int) -> str:
        return names.get(nbytes, "") if not op or uses_cublas(op) else ""

    return name_of


def of_this_gpu() -> Libraries:
    """`recognized` for the current GPU, in this environment. It has never run on CUDA."""
    release = torch.__version__.split(".")
    return recognized(capabilities.of_this_gpu(), os.environ, (int(release[0]), int(release[1])))


class Workspaces:
    """The workspaces of one process on one device, as its threads come to take them."""

    def __init__(self, capability: float, environ: Mapping[str, str], release: Release = (2, 13)) -> None:
        self.sizes = workspace(capability, environ, release)
        self._release = release
        self._taken: set[tuple[str, int, int]] = set()

    def take(self, *, thread: int, stream: int, lt: bool = False) -> tuple[int, ...]:
        """The blocks, in bytes, that a call allocates for good: none where this thread has them on this stream.

        lt: the call runs on cublasLt. In 2.11 such a call takes cuBLAS's handle, and so its workspace, as well.
        """
        own = lt and not self.sizes.shared
        wanted = [("cublas", self.sizes.cublas)] if not own or self._release <= (2, 11) else []
        wanted += [("lt", self.sizes.lt)] if own else []
        new = [(kind, size) for kind, size in wanted if (kind, thread, stream) not in self._taken]
        self._taken.update((kind, thread, stream) for kind, _ in new)
        return tuple(size for _, size in new if size)

    def clear(self) -> None:
        """What `torch._C._cuda_clearCublasWorkspaces()` frees: all of them."""
        self._taken.clear()
