"""LoRA and DoRA by peft: the weights of a model are frozen, and small matrices beside its linear layers are trained.

peft changes the transformers model in place, so a stage, ZeRO and the ledger see the same model with more parameters.
The matrices have the dtype of the weights: DeepSpeed would cast them to it, and keeps fp32 masters of them.
LoRA: Hu et al. 2021, arXiv 2106.09685. DoRA: Liu et al. 2024, arXiv 2402.09353.
"""

import copy
import hashlib
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from harness.config.errors import first_line
from harness.config.rules.adapter import CONFIG, WEIGHTS, config_in
from harness.config.settings import Refusal, Settings
from harness.model import init_weights, manifest
from harness.model.loader import mismatch
from harness.model.plan import Plan
from harness.model.stage import Stage, Uncuttable, layers_of, parts
from harness.quantization import nf4
from harness.quantization.packing import default_dtype
from harness.record import results
from harness.runtime.imports import import_peft

LINEAR = (nn.Linear, Conv1D)
NAME = "default"
"""peft's name of the adapter; it is part of the parameters' names."""

PREFIX = "base_model.model."
"""What peft puts before each name in an adapter's file."""

FROZEN = ".base_layer."
"""In the names of frozen weights, which peft may write beside the adapter of a head."""


def wanted(settings: Settings) -> bool:
    """Whether the model has an adapter."""
    return settings.adapter.kind != "none" or settings.adapter.path is not None


def outline(settings: Settings, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model on `meta`, with the adapter of `settings`, if any. Raises Refusal where it fits no such model."""
    whole = init_weights.outline(config, dtype, settings.model.attention)
    if wanted(settings):
        adapter = _config(settings, whole)
        try:
            with torch.device("meta"):
                _inject(whole, adapter)
        except (TypeError, ValueError) as error:
            if settings.adapter.path is None:
                raise
            remedy = f"peft cannot put it on this model: {first_line(error)}"
            raise Refusal("adapter.path", settings.adapter.path, remedy) from error
    return whole


def apply(
    settings: Settings, model: PreTrainedModel | Stage, whole: PreTrainedModel, read: bool
) -> dict[str, int]:
    """Put the adapter of `settings` on `model`, all or a stage of `whole`, which is on `meta` and has it already.

    New matrices depend on the seed and their names alone, as all weights do: any number of ranks and stages has the
    same. With `read` those of `adapter.path` are read, and their bytes are returned by name. Raises Refusal where they
    are not this model's.
    """
    if not wanted(settings):
        return {}
    adapter, part = settings.adapter, model.model if isinstance(model, Stage) else model
    _inject(part, whole.peft_config[NAME])
    if isinstance(model, Stage):
        model.renew_names("base_layer")
    _initialise(part, settings.seed)
    return _read(adapter.path, part, whole) if adapter.path is not None and read else {}


def prove(plan: Plan) -> None:
    """Refuse an adapter that does not fit the model of `plan`, or leaves a stage without anything to train.

    It comes before any ledger: peft makes tensors where it is first imported.
    """
    settings = plan.settings
    if not wanted(settings):
        return
    if settings.adapter.kind == "qlora":
        nf4.import_library()
    whole = outline(settings, plan.config, getattr(torch, settings.dtype))
    loss, head = settings.loss.kind, whole.get_output_embeddings()
    if settings.mode == "train" and loss != "full" and type(head) is not nn.Linear:
        remedy = "the adapter is on the head, which computes this loss by its own weight alone; use loss=full"
        raise Refusal("loss", loss, remedy)
    if settings.mode == "infer" or settings.pipeline.stages == 1:
        return
    for number, stage in enumerate(parts(whole, plan.split)):
        if not any(parameter.requires_grad for parameter in stage.values()):
            remedy = f"stage {number} has none of them, and nothing to train; name layers of every stage"
            raise Refusal("adapter.targets", settings.adapter.targets, remedy)


def exported(settings: Settings, parameter: Tensor) -> bool:
    """Whether `parameter` is written at the end: all are, except the frozen ones beside an adapter."""
    return not wanted(settings) or settings.adapter.merge or parameter.requires_grad


def sized(settings: Settings, record: results.Model, whole: nn.Module) -> results.Model:
    """The `record` of a model in training, with the number of parameters that are trained beside frozen ones."""
    if not wanted(settings):
        return record
    return record.plus(trainable=sum(each.numel() for each in whole.parameters() if each.requires_grad))


def to_export(
    plan: Plan, model: nn.Module, state: dict[str, Tensor] | None
) -> tuple[nn.Module, dict[str, Tensor] | None]:
    """The model to export, and its `state` at rank 0, None elsewhere: the adapter alone as peft has it, or merged.

    Merging changes the tensors in `state`.
    """
    settings = plan.settings
    if not settings.adapter.merge:
        if wanted(settings):
            whole: Any = model
            whole._hf_peft_config_loaded = True  # transformers then writes the adapter alone
            whole.peft_config[NAME].inference_mode = True
        return model, state
    dtype = getattr(torch, settings.dtype)
    plain = init_weights.outline(plan.config, dtype, settings.model.attention)
    return plain, None if state is None else _merged(outline(settings, plan.config, dtype), state)


def _merged(whole: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without the adapter, from the `state` of `whole` with it."""
    from peft.tuners.lora import LoraLayer

    whole.load_state_dict(state, strict=False, assign=True)
    added = set()
    for name, module in whole.named_modules():
        if isinstance(module, LoraLayer):
            module.merge()
            added |= {f"{name}.{each}" for each in module.state_dict() if not each.startswith("base_layer.")}
    merged = {name: each for name, each in whole.state_dict().items() if name in state and name not in added}
    return {name.replace(".base_layer.", "."): each for name, each in merged.items()}


def _inject(model: PreTrainedModel, config: Any) -> None:
    from peft import inject_adapter_in_model

    # beside packed weights peft takes the default dtype, and beside others theirs
    with warnings.catch_warnings(), default_dtype(model.dtype):
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # peft sets it right
        inject_adapter_in_model(copy.copy(config), model, NAME)


@torch.no_grad()
def _initialise(model: PreTrainedModel, seed: int) -> None:
    """Initialise each layer's matrices as peft does, with a seed of its own."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            digest = hashlib.blake2b(f"{seed}/{name}/adapter".encode(), digest_size=8).digest()
            torch.default_generator.manual_seed(int.from_bytes(digest))
            module.reset_lora_parameters(NAME, True)
    set_seed(seed)


def _config(settings: Settings, whole: PreTrainedModel) -> Any:
    """peft's config: that of `adapter.path`, or a new one."""
    peft = import_peft()
    adapter = settings.adapter
    if adapter.path is not None:
        config = _stored_config(adapter.path)
    else:
        config = peft.LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            lora_dropout=adapter.dropout,
            target_modules=_targets(adapter.targets, whole),
            use_dora=adapter.kind == "dora",
            base_model_name_or_path=settings.model.path,
            task_type="CAUSAL_LM",
        )
        config.target_modules = sorted(config.target_modules)  # peft's set would be written in any order
    config.inference_mode = settings.mode == "infer"
    return config


def _targets(asked: list[str], whole: PreTrainedModel) -> list[str]:
    """The ends of names of the layers that get an adapter. Raises Refusal for names of none, or of no linear layer."""
    linear = {name for name, module in whole.named_modules() if isinstance(module, LINEAR)}
    if not asked:
        inside = _inside(whole)
        return sorted({name.rpartition(".")[2] for name in linear if name.startswith(inside)})
    names = [name for name, _ in whole.named_modules()]
    firsts = dict(whole.named_parameters())
    tied = {id(each) for name, each in whole.named_parameters(remove_duplicate=False) if name not in firsts}
    for target in asked:
        named = [name for name in names if name == target or name.endswith(f".{target}")]
        other = next((name for name in named if name not in linear), None)
        if not named:
            ends = sorted({name.rpartition(".")[2] for name in linear})
            close = get_close_matches(target.rpartition(".")[2], ends, 1, 0.5)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(ends)}"
            raise Refusal("adapter.targets", asked, f"the model has no {target}; {hint}")
        if other is not None:
            kind = type(whole.get_submodule(other)).__name__
            raise Refusal(
                "adapter.targets", asked, f"{other} is no linear layer but {kind}; name linear layers"
            )
        for name in named:
            if id(whole.get_submodule(name).weight) in tied:
                raise Refusal(
                    "adapter.targets", asked, f"the weight of {name} is another layer's too; leave it out"
                )
    return asked


def _inside(whole: PreTrainedModel) -> str:
    """The beginning of the names of all modules in the model's layers; empty where it has no list of layers."""
    try:
        return f"{layers_of(whole)[0]}."
    except Uncuttable:
        return ""


def _stored_config(place: str) -> Any:
    """The config of the adapter in `place`. Raises Refusal where peft does not take it."""
    from peft import LoraConfig

    config_in(place)
    manifest.check(place, Path(place), (CONFIG, WEIGHTS), "adapter.path")
    try:
        config = LoraConfig.from_pretrained(place)
    except (TypeError, ValueError, KeyError) as error:
        raise Refusal(
            "adapter.path", place, f"peft does not take its {CONFIG}: {first_line(error)}"
        ) from error
    if not isinstance(config, LoraConfig):
        raise Refusal("adapter.path", place, f"its {CONFIG} is of another kind; give a LORA adapter")
    return config


def _read(place: str, model: PreTrainedModel, whole: PreTrainedModel) -> dict[str, int]:
    """Fill the adapter of `model` from the file in `place`; return what was read, in bytes by name.

    Raises Refusal where it is not an adapter of `whole`.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    # else peft adds the head's frozen weight, and may ask a hub for the base model's config
    alone: dict[str, Any] = {"save_embedding_layers": False}
    expected = {name: tuple(each.shape) for name, each in get_peft_model_state_dict(whole, **alone).items()}
    own = get_peft_model_state_dict(model, **alone)
    try:
        # framework="pt" maps the file, which would count as allocated memory
        with safe_open(Path(place) / WEIGHTS, framework="numpy") as file:
            stored = {
                name: tuple(file.get_slice(name).get_shape())
                for name in file.keys()  # noqa: SIM118
                if FROZEN not in name
            }
        _check(place, {name.removeprefix(PREFIX): shape for name, shape in stored.items()}, expected)
        with safe_open(Path(place) / WEIGHTS, framework="pt") as file:
            state = {name: file.get_tensor(PREFIX + name) for name in own}
    except SafetensorError as error:
        raise Refusal("adapter.path", place, f"{WEIGHTS} in it is corrupt: {first_line(error)}") from error
    unread = set_peft_model_state_dict(model, state).unexpected_keys
    assert not unread, unread
    return {name: tensor.nbytes for name, tensor in state.items()}


def _check(place: str, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise Refusal where the tensors in a file are not those of the model's adapter."""
    common = expected.keys() & stored.keys()
    reshaped = [(name, stored[name], expected[name]) for name in common if stored[name] != expected[name]]
    problem = mismatch(expected.keys() - stored.keys(), stored.keys() - expected.keys(), reshaped)
    if problem:
        raise Refusal("adapter.path", place, f"it is an adapter of another model: {problem}")
