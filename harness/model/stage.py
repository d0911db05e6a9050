"""A stage: a causal language model cut to some of its layers. The same object trains in a pipeline and generates with a
KV cache.

A stage is the transformers model itself with a part of its layers; the first also has the embedding, the last the head.
The model's own code before and after its layers runs in every stage. Where that code changes a stage's input, the model
cannot be cut; `stage_check.py` detects this.
"""

import copy
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import Cache, PretrainedConfig, PreTrainedModel

from harness.config.settings import Model, Refusal
from harness.model import init_weights, loader, tensor_parallel, widths
from harness.model.loader import check_values, loading, whole_checkpoint
from harness.quantization.method import Quantization
from harness.runtime.memory_limit import check_parameters


class Uncuttable(Exception):
    """The model is not a list of layers with modules before and after it; the message says why."""


class Layers(nn.ModuleList):
    """A list of layers that keep their numbers of the whole model, so that parameter names are the same."""

    def __init__(self, layers: list[nn.Module], first: int) -> None:
        super().__init__()
        for number, layer in enumerate(layers, first):
            self.add_module(str(number), layer)

    def __getitem__(self, index: int | slice) -> Any:
        return list(self._modules.values())[index]


class Stage(nn.Module):
    """A causal language model without all that does not belong to `layers`.

    H is the hidden size, V the vocabulary size. `model` is modified and belongs to the stage. Raises Uncuttable where
    `model` has no list of layers, or its layers share parameters.
    """

    def __init__(self, model: PreTrainedModel, layers: range) -> None:
        super().__init__()
        path, all_layers = layers_of(model)
        self.first, self.last = layers.start == 0, layers.stop == len(all_layers)
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        if any(
            len(same) > 1 and any(name.startswith(f"{path}.") for name in same) for same in names.values()
        ):
            raise Uncuttable("its layers share parameters")
        parent, attribute = _parent(model, path)
        for unneeded in _unneeded(model, path, self.first, self.last):
            owner, key = _parent(model, unneeded)
            setattr(owner, key, nn.Identity())
        own_layers = list(all_layers)[layers.start : layers.stop]
        numbered = Layers(own_layers, layers.start)
        setattr(parent, attribute, numbered)
        _renumber(own_layers, layers.start)
        _configure(model, layers, len(all_layers))
        self.model = model
        self.receives: list[int] = []
        """The shape of the hidden states that this stage receives in training, once known."""
        self.items: float | None = None
        """In training, the mean number of labels in a micro-batch of the step; None where each position has one."""
        self.config: PretrainedConfig = model.config
        """The model's config with only this stage's layers: its cache is built from it."""
        self._within = (parent, numbered)  # a tuple: nn.Module must not register them a second time
        self._names = {name: names[id(p)][0] for name, p in model.named_parameters()}
        self.tied = {same[0]: same[1:] for same in names.values() if len(same) > 1}
        """For parameters that both the first and the last stage have: from the first name to the other names."""

    @property
    def layers(self) -> Layers:
        """The layers of this stage."""
        return self._within[1]

    @property
    def hidden(self) -> int:
        """H, the hidden size."""
        return int(_text(self.config).hidden_size)

    def owned(self) -> dict[str, nn.Parameter]:
        """Its parameters by their first names in the whole model."""
        return {self._names[name]: parameter for name, parameter in self.model.named_parameters()}

    def renew_names(self, within: str) -> None:
        """Take up the names of its parameters again, after layers were put into others, each under the name `within`.

        The names of the others, which are new, are those of the whole model: layers keep their numbers.
        """
        before = self._names
        self._names = {}
        for name, _ in self.model.named_parameters():
            old = name.replace(f".{within}.", ".")
            self._names[name] = name if before.get(old, old) == old else before[old]

    def stored(self) -> dict[str, Tensor]:
        """Its parameters and persistent buffers by their first names in the whole model: what a
        checkpoint has of it.
        """
        return {**self.owned(), **init_weights.lasting(self.model)}

    def forward(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        keep: int = 0,
    ) -> Tensor:
        """From tokens [B, T] in the first stage, or hidden states [B, T, H] in others, to hidden states, or to logits
        in the last stage.

        Logits are [B, T, V], or [B, keep, V] of the last `keep` positions. `mask` [B, past + T] is 0 on padding;
        `positions` are [B, T].
        """
        optional = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        arguments: dict[str, Any] = {name: value for name, value in optional.items() if value is not None}
        arguments["input_ids" if self.first else "inputs_embeds"] = inputs
        arguments["use_cache"] = cache is not None
        if self.last and keep:
            arguments["logits_to_keep"] = keep
        if not self.last:
            hidden: Tensor = self._within[0](**arguments).last_hidden_state
            return hidden
        logits: Tensor = self.model(**arguments).logits
        return logits

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The model's own mean loss per token, or the sum by `items`, of what `forward` returned and labels [B, T]."""
        vocabulary = _text(self.config).vocab_size
        items = {} if self.items is None else {"num_items_in_batch": self.items}
        loss: Tensor = self.model.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **items)
        return loss


def layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name of the model's list of layers, and the list. Raises Uncuttable where there is none."""
    number = _text(model.config).num_hidden_layers
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == number
    ]
    if not candidates:
        raise Uncuttable(f"its {number} layers are not in one list")
    return min(candidates, key=lambda pair: pair[0].count("."))


def layers_for(model: PreTrainedModel, key: str, value: object, instead: str) -> tuple[str, nn.ModuleList]:
    """`layers_of`, for a setting that needs it. Raises Refusal where there is none; `instead` says what would do."""
    try:
        return layers_of(model)
    except Uncuttable as error:
        raise Refusal(key, value, f"{error}; {instead}") from error


def parts(whole: PreTrainedModel, split: Sequence[int], buffers: bool = False) -> list[dict[str, Tensor]]:
    """The parameters of each stage by their names in `whole`, in its order. A tied parameter is in two stages.

    With `buffers` the persistent buffers follow.
    """
    path, _ = layers_of(whole)
    not_first = tuple(f"{name}." for name in _unneeded(whole, path, first=True, last=False))
    stage_of = [stage for stage, layers in enumerate(split) for _ in range(layers)]
    by_stage: list[dict[str, Tensor]] = [{} for _ in split]
    parameters: dict[str, Tensor] = dict(whole.named_parameters(remove_duplicate=False))
    for name, tensor in (parameters | init_weights.lasting(whole) if buffers else parameters).items():
        if name.startswith(f"{path}."):
            stage = stage_of[int(name.removeprefix(f"{path}.").partition(".")[0])]
        else:
            stage = len(split) - 1 if name.startswith(not_first) else 0
        by_stage[stage][name] = tensor
    return by_stage


def layer_kinds(whole: PreTrainedModel) -> list[Hashable]:
    """A key for each layer of `whole`: layers with equal keys have parameters of the same shapes and compute alike."""
    _, layers = layers_of(whole)
    text = _text(whole.config)
    layer_lists = [
        value for value in vars(text).values() if isinstance(value, list) and len(value) == len(layers)
    ]
    return [
        (
            tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters()),
            tuple(str(value[number]) for value in layer_lists),
        )
        for number, layer in enumerate(layers)
    ]


def build(
    settings: Model,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    layers: range,
    read: bool = True,
    mesh: DeviceMesh | None = None,
    quantization: Quantization | None = None,
) -> Stage:
    """Build the stage with `layers`. Its weights are those of the whole model of `loader.build`, but only its part is
    allocated.

    With `mesh` this rank has its part of each weight (`tensor_parallel.py`). With `quantization` packed weights are
    unpacked as they are read.

    Raises Refusal as `loader.build` does. A checkpoint whose tensors transformers renames or merges is first loaded
    whole on the CPU.
    """
    from_checkpoint = settings.path is not None and not settings.random
    directory = whole_checkpoint(str(settings.path)) if from_checkpoint and read else None
    whole = tensor_parallel.outline(config, dtype, settings.attention, mesh)
    widths.check(settings, whole)
    direct = directory is not None and init_weights.matches_checkpoint(whole, directory)
    tree = list(init_weights.modules(whole))
    stage = Stage(whole, layers)
    if read:
        check_parameters(settings, tensor_parallel.nbytes(stage), dtype, device)
    unset = init_weights.make(whole, tree, stage, device, seed)
    stored = stage.stored() if from_checkpoint else {}
    check_values(settings, unset - set(stored))
    if directory is None:
        return stage
    for name in init_weights.in_full(whole, stored):
        stored[name].data = stored[name].data.float()
    with loading(str(settings.path)):
        if not (direct and init_weights.read(stored, directory)):
            host, options = torch.device("cpu"), (True, mesh, quantization)
            _copy(stored, stage.tied, loader.build(settings, config, dtype, host, seed, *options))
    return stage


def _copy(stored: Mapping[str, Tensor], tied: Mapping[str, Sequence[str]], whole: PreTrainedModel) -> None:
    """Copy the weights of `whole` to `stored`. Raises ValueError where parameters that should be `tied`
    differ in it.
    """
    weights: dict[str, Tensor] = {
        **dict(whole.named_parameters(remove_duplicate=False)),
        **dict(whole.named_buffers()),
    }
    for name, others in tied.items():
        if any(weights[other] is not weights[name] for other in others):
            raise ValueError(
                f"{name} and {others[0]} differ in it, and its config ties them; say tie_word_embeddings=false there"
            )
    for name, tensor in stored.items():
        tensor.data.copy_(weights[name])


def _text(config: PretrainedConfig) -> PretrainedConfig:
    return config.get_text_config(decoder=True)


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that contains `path`, and the attribute name there."""
    parent_path, _, name = path.rpartition(".")
    return model.get_submodule(parent_path), name


def _unneeded(model: PreTrainedModel, path: str, first: bool, last: bool) -> Iterator[str]:
    """The names of modules outside of the layers that a stage does not need."""
    parts = path.split(".")
    for depth in range(len(parts)):
        parent_path = ".".join(parts[:depth])
        before = True
        for name, child in list(model.get_submodule(parent_path).named_children()):
            if name == parts[depth]:
                before = False
                continue
            relevant = next(child.parameters(), None) is not None or "Norm" in type(child).__name__
            beside_layers = depth == len(parts) - 1
            if relevant and not (first if beside_layers and before else last):
                yield f"{parent_path}.{name}".lstrip(".")


def _renumber(layers: list[nn.Module], first: int) -> None:
    """Number the layers from 0: a layer finds its cache by number, and a stage's cache begins with its
    own first layer.
    """
    for layer in layers:
        for module in layer.modules():
            if isinstance(number := getattr(module, "layer_idx", None), int):
                module.layer_idx = number - first  # type: ignore[assignment]


def _configure(model: PreTrainedModel, layers: range, number: int) -> None:
    """Give the model a config with only these layers, in every module that has the config."""
    whole = model.config
    part = copy.deepcopy(whole)
    text = _text(part)
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == number:  # one item for each layer
            setattr(text, key, value[layers.start : layers.stop])
    text.num_hidden_layers = len(layers)
    whole_text = _text(whole)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is whole:
            module.config = part
        elif config is whole_text:
            module.config = text
