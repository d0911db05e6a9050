"""Stand-ins in torch and transformers for fake tensors: what would need values, or a real tensor."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor

from harness.rehearsal.zero_shims import Original


def apply_in_place(original: Original) -> Original:
    """`Module._apply` that sets `.data`, as torch's own does for real parameters."""

    def stand_in(self: torch.nn.Module, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
        if recurse:
            for child in self.children():
                child._apply(fn)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if parameter is not None and parameter.device.type == "meta":
                    self._parameters[name] = torch.nn.Parameter(fn(parameter), parameter.requires_grad)
                elif parameter is not None:
                    parameter.data = fn(parameter)
                    if (scales := getattr(parameter, "quant_state", None)) is not None:
                        scales.to(parameter.device)  # as a packed weight's own `to` does
                    if parameter.grad is not None:
                        parameter.grad.data = fn(parameter.grad)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = fn(buffer)
        return self

    return stand_in


def is_never_fake(original: Original) -> Original:
    """transformers' `is_fake_tensor`: always false, because the values of masks are known (`known_values.py`)."""

    def stand_in(x: Any) -> bool:
        return False

    return stand_in


def is_always_true(original: Original) -> Original:
    """`torch._is_all_true`, with which distributions check their parameters: always true, as values are unknown."""

    def stand_in(input: torch.Tensor) -> bool:
        original(input)
        return True

    return stand_in


def get_fake_rng_state(original: Original) -> Original:
    """`torch.get_rng_state`, whose tensor comes from no operator: it returns a fake one."""

    def stand_in() -> torch.Tensor:
        mode = detect_fake_mode()
        assert mode is not None
        return mode.from_tensor(original())

    return stand_in


def ignore_rng_state(original: Original) -> Original:
    """`torch.set_rng_state`: it does nothing, because random numbers have no values here."""

    def stand_in(new_state: torch.Tensor) -> None:
        pass

    return stand_in


def packed_parameter(original: Original) -> Original:
    """bitsandbytes' `Params4bit.__new__`: of a fake tensor it makes a plain parameter with the same attributes."""

    def stand_in(
        cls: type,
        data: Any = None,
        requires_grad: bool = False,
        quant_state: Any = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: Any = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Any:
        state = {
            "quant_state": quant_state,
            "blocksize": blocksize,
            "compress_statistics": compress_statistics,
            "quant_type": quant_type,
            "quant_storage": quant_storage,
            "module": module,
            "bnb_quantized": bnb_quantized,
        }
        if not isinstance(data, FakeTensor):
            return original(cls, data, requires_grad, **state, **kwargs)
        parameter = torch.nn.Parameter(data, requires_grad)
        vars(parameter).update(state)
        return parameter

    return stand_in


def quantize_fake_tensors(original: Original) -> Original:
    """A quantized layer's `_quantize`, which packs only tensors of torch's own class: it packs fake tensors too."""

    def stand_in(self: Any, tensor: torch.Tensor, axis: int) -> Any:
        from optimum.quanto.tensor.packed import PackedTensor

        quantized = original(self, tensor, axis)
        if not isinstance(quantized._data, PackedTensor):
            quantized._data = PackedTensor.pack(quantized._data, self.nbits)
        return quantized

    return stand_in


def grouped_mm_of_any_dtype(original: Original) -> Original:
    """`_meta_grouped_mm_common`, the shape function of a grouped matrix product: it accepts fp32, as the kernels do."""

    def stand_in(
        mat_a: Any,
        mat_b: Any,
        scale_a: Any,
        scale_b: Any,
        offs: Any = None,
        bias: Any = None,
        scale_result: Any = None,
        out_dtype: Any = None,
        use_fast_accum: bool = False,
    ) -> Any:
        if scale_a is None and mat_a.dtype == mat_b.dtype == torch.float32:
            return import_module("torch._meta_registrations")._create_grouped_mm_output_tensor(
                mat_a, mat_b, offs, out_dtype
            )
        options = bias, scale_result, out_dtype, use_fast_accum
        return original(mat_a, mat_b, scale_a, scale_b, offs, *options)

    return stand_in
