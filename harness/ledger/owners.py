"""Claims of owners: a module, an optimizer, a DeepSpeed engine, a KV cache.

Each function yields claims `(category, name, tensor)`. DeepSpeed's tensors are read from its attributes by name, as
of 0.19. A tensor under a name that is not listed here is claimed as `workspace` under that name, never lost.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from harness.ledger.tensors import tensors_in

Claim = tuple[str, str, torch.Tensor]

DEEPSPEED = {
    # ZeRO-1 and 2
    "bit16_groups_flat": "parameters",
    "round_robin_bit16_groups": "parameters",
    "parallel_partitioned_bit16_groups": "parameters",
    "params_in_partition": "parameters",
    "params_not_in_partition": "parameters",
    "single_partition_of_fp32_groups": "optimizer",
    "averaged_gradients": "gradients",
    "all_grad_tensors": "gradients",
    "accumulated_grads_in_cpu": "gradients",
    "grads_in_partition": "gradients",
    "temp_grad_buffer_for_cpu_offload": "communication",
    "temp_grad_buffer_for_gpu_offload": "communication",
    "param_buffer_of_bit16_for_cpu_offload_groups": "parameters",
    "_muon_pending_momentum": "optimizer",
    "_muon_allgather_buffers": "communication",
    # ZeRO-3
    "fp16_partitioned_groups": "parameters",
    "fp16_partitioned_groups_flat": "parameters",
    "param_groups_fp16_flat_cpu_memory": "parameters",
    "lp_param_buffer": "parameters",
    "fp32_partitioned_groups_flat": "optimizer",
    "grad_partitions_flat_buffer": "gradients",
    "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition": "gradients",
    # BF16_Optimizer
    "bf16_groups_flat": "parameters",
    "bf16_partitioned_groups": "parameters",
    "fp32_groups_flat_partition": "optimizer",
    "fp32_groups_gradients": "gradients",
    "fp32_groups_gradient_dict": "gradients",
    "fp32_groups_gradients_flat": "gradients",
    "fp32_groups_actual_gradients_flat": "gradients",
    "fp32_groups_gradient_flat_partition": "gradients",
    # FP16_UnfusedOptimizer, which bf16 without ZeRO gets
    "fp32_groups": "optimizer",
}
"""DeepSpeed 0.19's attributes with tensors, and the category of each."""


STATES = {
    "state1": "exp_avg",
    "absmax1": "exp_avg.absmax",
    "qmap1": "exp_avg.qmap",
    "state2": "exp_avg_sq",
    "absmax2": "exp_avg_sq.absmax",
    "qmap2": "exp_avg_sq.qmap",
}
"""Names of bitsandbytes for the states of its optimizers, and what each is in torch's words."""


def module_claims(module: torch.nn.Module) -> Iterator[Claim]:
    """Parameters and buffers. Under ZeRO-3 this rank's shards, and the full parameters while they are gathered."""
    parts = [*module.named_modules()]
    for name, parameter in _members(module, parts, "parameters"):
        yield from parameter_claims(name, parameter)
    for name, buffer in _members(module, parts, "buffers"):
        yield "parameters", name, buffer
    for name, part in parts:
        if packs(part):
            for key, holder, attribute in auxiliary_tensors(part):
                for tensor in tensors_in(holder[attribute]):
                    yield "parameters", f"{name}.{key}".removeprefix("."), tensor


def _members(
    module: torch.nn.Module, parts: Sequence[tuple[str, torch.nn.Module]], kind: str
) -> Iterable[tuple[str, Any]]:
    """`module.named_parameters()`, or buffers, without walking through the modules again."""
    method = f"named_{kind}"
    if getattr(getattr(module, method), "__func__", None) is not getattr(torch.nn.Module, method):
        return getattr(module, method)()  # type: ignore[no-any-return]
    members = {}
    for prefix, part in parts:
        for name, member in getattr(part, f"_{kind}").items():
            if member is not None and id(member) not in members:
                members[id(member)] = f"{prefix}.{name}" if prefix else name, member
    return members.values()


def packs(module: torch.nn.Module) -> bool:
    """Whether a layer's weight is not a plain floating-point tensor: few bits, with scales beside it."""
    if type(module).__module__.startswith("transformers.integrations."):
        return True
    for weight in module._parameters.values():
        if weight is not None and (
            type(weight) not in KINDS or not weight.is_floating_point() or weight.itemsize == 1
        ):
            return True
    return False


KINDS = (torch.Tensor, torch.nn.Parameter, DTensor, FakeTensor)
"""Tensor classes without data beside their own."""


def auxiliary_tensors(module: torch.nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """What a layer that `packs` stores beside its weight in attributes of itself or of the weight: scales, code tables.

    Yields the name, and the dict and key that contain it.
    """
    if not packs(module):
        return
    holders = {"": vars(module)}
    for name, weight in module._parameters.items():
        # a weight that is not its own only tensor consists of these attributes
        if weight is not None and next(tensors_in(weight), None) is weight:
            holders[name] = vars(weight)
    for name, holder in holders.items():
        for key in [*holder]:
            if key not in PLAIN:
                yield from _tensor_places(f"{name}.{key}".removeprefix("."), holder, key)


PLAIN = frozenset(vars(torch.nn.Module())) | {"grad", "module", "fake_mode"}
"""Attributes of every module, and those that lead from a weight to its module, or a fake one to all others."""


def _tensor_places(
    name: str, holder: dict[str, Any], key: str, depth: int = 3
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Where `holder[key]` has tensors: in itself, or in the attributes of an object that groups tensors."""
    value = holder[key]
    if isinstance(value, (torch.Tensor, tuple, list, dict)):
        if next(tensors_in(value), None) is not None:
            yield name, holder, key
    elif depth and hasattr(value, "__dict__") and not callable(value):  # not a module, class or function
        for part in [*vars(value)]:
            yield from _tensor_places(f"{name}.{part}", vars(value), part, depth - 1)


def parameter_claims(name: str, parameter: torch.nn.Parameter) -> Iterator[Claim]:
    """One parameter's shard or data, and its gradient."""
    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        yield "parameters", name, parameter
    else:
        yield "parameters", name, shard
        if parameter.numel():
            yield "gathered", name, parameter
    if parameter.grad is not None:
        yield "gradients", name, parameter.grad


def optimizer_claims(optimizer: Any) -> Iterator[Claim]:
    """A torch optimizer's state, and the gradients of its parameters."""
    for index, state in enumerate(optimizer.state.values()):
        for key, value in state.items():
            for part, tensor in _parts(value):
                yield "optimizer", f"state[{index}].{STATES.get(key, key)}{part}", tensor
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is not None:
                yield "gradients", f"grad[{index}]", parameter.grad


def _parts(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """A state that is a tensor; for one that consists of others, as codes and their scales, those by name."""
    if isinstance(value, torch.Tensor):
        names = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else ()
        if not names:
            yield "", value
        for name in names:
            for part, tensor in _parts(getattr(value, name)):
                yield f".{name}{part}", tensor


def engine_claims(engine: Any, asked: Collection[Any] = ()) -> Iterator[Claim]:
    """A DeepSpeed engine's module, the buffers of its optimizer wrapper by name, and the torch optimizer inside.

    A module among `asked` has claimed already.
    """
    if not any(engine.module is owner for owner in asked):
        yield from module_claims(engine.module)
    wrapper = engine.optimizer
    inner = getattr(wrapper, "optimizer", wrapper)
    yield from optimizer_claims(inner)
    yield from bucket_claims(engine)
    yield from boundary_claims(engine)
    if inner is not wrapper:
        for attribute, value in vars(wrapper).items():
            category = DEEPSPEED.get(attribute, "workspace")
            for tensor in tensors_in(value):
                if not hasattr(tensor, "ds_tensor"):  # the module claims its parameters itself
                    yield category, f"{type(wrapper).__name__}.{attribute}", tensor


def cache_claims(cache: Any) -> Iterator[Claim]:
    """Keys, values and other tensors of a transformers cache, layer by layer, or all pages of a paged cache."""
    if not hasattr(cache, "layers"):  # a PagedAttentionCache has one storage for all layers
        yield "kv_cache", "cache_tensor", cache.cache_tensor
        return
    for index, layer in enumerate(cache.layers):
        for attribute, value in vars(layer).items():
            for tensor in tensors_in(value):
                yield "kv_cache", f"layers[{index}].{attribute}", tensor


def boundary_claims(engine: Any) -> Iterator[Claim]:
    """What a pipeline engine receives, and the inputs of its forwards: hidden states, or tokens."""
    buffers = getattr(engine, "pipe_buffers", {})
    values = {f"pipe_buffers[{name}]": buffers.get(name) for name in ("inputs", "labels")}
    for name in ("pipe_recv_buf", "grad_layer"):
        values[name] = getattr(engine, name, None)
    for name, value in values.items():
        for tensor in tensors_in((value,)):
            category = "activations" if tensor.dtype.is_floating_point else "inputs"
            yield category, f"{type(engine).__name__}.{name}", tensor


def bucket_claims(engine: Any) -> Iterator[Claim]:
    """ZeRO's backward buffers, which it may drop before backward ends. Cheap enough to read after every gradient."""
    for dtype, bucket in getattr(engine.optimizer, "ipg_buckets", {}).items():
        for tensor in tensors_in(bucket.buffer):
            yield "communication", f"ipg_buckets[{str(dtype).removeprefix('torch.')}]", tensor
