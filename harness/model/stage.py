"""A causal language model cut into stages: one object that trains in a pipeline and generates with a KV cache.

A stage is the transformers model itself with a part of its layers; the first has the embedding, the last the head.
What comes before the layers in the model's own code, and after them, runs in every stage: where that changes what a
stage was given, the model cannot be cut, and `stage_check.py` finds out.
"""

import copy
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import Cache, PretrainedConfig, PreTrainedModel

from harness.config.settings import Model
from harness.model import init_weights, loader, tensor_parallel, widths
from harness.model.loader import check_values, loading, whole_checkpoint
from harness.quantization.method import Quantization
from harness.runtime.memory_limit import check_parameters


class Uncuttable(Exception):
    """A model that is no list of layers with something before and something after; says why."""


class Layers(nn.ModuleList):
    """Layers that keep the numbers they have in the whole model, so that their names are the same."""

    def __init__(self, layers: list[nn.Module], first: int) -> None:
        super().__init__()
        for number, layer in enumerate(layers, first):
            self.add_module(str(number), layer)

    def __getitem__(self, index: int | slice) -> Any:
        return list(self._modules.values())[index]


class Stage(nn.Module):
    """`layers` of a causal language model, of which all else is cut away.

    H is the hidden size, V the vocabulary. `model` is changed, and is the stage's own from then on.
    Raises Uncuttable where `model` has no list of layers, or they share parameters.
    """

    def __init__(self, model: PreTrainedModel, layers: range) -> None:
        super().__init__()
        path, every = layers_of(model)
        self.first, self.last = layers.start == 0, layers.stop == len(every)
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        if any(
            len(same) > 1 and any(name.startswith(f"{path}.") for name in same) for same in names.values()
        ):
            raise Uncuttable("its layers share parameters")
        home, place = _parent(model, path)
        for drop in _not_of(model, path, self.first, self.last):
            owner, key = _parent(model, drop)
            setattr(owner, key, nn.Identity())
        kept = list(every)[layers.start : layers.stop]
        numbered = Layers(kept, layers.start)
        setattr(home, place, numbered)
        _renumber(kept, layers.start)
        _configure(model, layers, len(every))
        self.model = model
        self.receives: list[int] = []
        """The shape of the hidden states that are sent to it in training, once that is known."""
        self.config: PretrainedConfig = model.config
        """The model's, with this stage's layers alone: what a cache of its own is made from."""
        self._within = (home, numbered)  # the model, and no second children of this one
        self._names = {name: names[id(p)][0] for name, p in model.named_parameters()}
        self.tied = {same[0]: same[1:] for same in names.values() if len(same) > 1}
        """The first names of parameters that the first stage and the last both have, and their others."""

    @property
    def layers(self) -> Layers:
        """Its own."""
        return self._within[1]

    @property
    def hidden(self) -> int:
        """H."""
        return int(_text(self.config).hidden_size)

    def owned(self) -> dict[str, nn.Parameter]:
        """Its parameters by the first names that they have in the whole model."""
        return {self._names[name]: parameter for name, parameter in self.model.named_parameters()}

    def stored(self) -> dict[str, Tensor]:
        """What a checkpoint has of it, by the first names in the whole model: parameters, and buffers that are kept."""
        return {**self.owned(), **init_weights.lasting(self.model)}

    def forward(
        self,
        given: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        keep: int = 0,
    ) -> Tensor:
        """From tokens [B, T], or hidden states [B, T, H] after the first stage, to hidden states or the last's logits.

        Those are [B, T, V], or [B, keep, V] of the last `keep` positions. `mask` [B, past + T] is 0 on padding, and
        `positions` are [B, T].
        """
        more = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        named: dict[str, Any] = {name: value for name, value in more.items() if value is not None}
        named["input_ids" if self.first else "inputs_embeds"] = given
        named["use_cache"] = cache is not None
        if self.last and keep:
            named["logits_to_keep"] = keep
        if not self.last:
            hidden: Tensor = self._within[0](**named).last_hidden_state
            return hidden
        logits: Tensor = self.model(**named).logits
        return logits

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The model's own loss per token, of logits [B, T, V] and labels [B, T]."""
        vocabulary = _text(self.config).vocab_size
        loss: Tensor = self.model.loss_function(logits=logits, labels=labels, vocab_size=vocabulary)
        return loss


def layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of a model's layers and its name. Raises Uncuttable where there is none."""
    number = _text(model.config).num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == number
    ]
    if not found:
        raise Uncuttable(f"it has no one list of its {number} layers")
    return min(found, key=lambda pair: pair[0].count("."))


def parts(whole: PreTrainedModel, split: Sequence[int], buffers: bool = False) -> list[dict[str, Tensor]]:
    """The parameters of each stage by their names in `whole`, in the order in which it has them; tied ones in two.

    After them come the buffers that a checkpoint has, where they are asked for.
    """
    path, _ = layers_of(whole)
    not_first = tuple(f"{name}." for name in _not_of(whole, path, first=True, last=False))
    stage_of = [stage for stage, layers in enumerate(split) for _ in range(layers)]
    found: list[dict[str, Tensor]] = [{} for _ in split]
    every: dict[str, Tensor] = dict(whole.named_parameters(remove_duplicate=False))
    for name, held in (every | init_weights.lasting(whole) if buffers else every).items():
        if name.startswith(f"{path}."):
            stage = stage_of[int(name.removeprefix(f"{path}.").partition(".")[0])]
        else:
            stage = len(split) - 1 if name.startswith(not_first) else 0
        found[stage][name] = held
    return found


def layer_kinds(whole: PreTrainedModel) -> list[Hashable]:
    """What each layer of `whole` is: layers of one kind have parameters of the same shapes, and compute alike."""
    _, layers = layers_of(whole)
    text = _text(whole.config)
    told = [value for value in vars(text).values() if isinstance(value, list) and len(value) == len(layers)]
    return [
        (
            tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters()),
            tuple(str(value[number]) for value in told),
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
    rehearsed: bool = False,
    mesh: DeviceMesh | None = None,
    quantization: Quantization | None = None,
) -> Stage:
    """The stage with `layers`: its weights are those of `model.build`'s whole, of which no more is ever in memory.

    With `mesh` this rank has its part of them (`tensor_parallel.py`). With `quantization` they are made whole as
    they are read.

    Raises Refusal as that does. A checkpoint whose tensors transformers renames or merges is loaded whole first.
    """
    reads = settings.path is not None and not settings.random
    directory = whole_checkpoint(str(settings.path)) if reads and not rehearsed else None
    whole = tensor_parallel.outline(config, dtype, settings.attention, mesh)
    widths.check(settings, whole)
    plain = directory is not None and init_weights.familiar(whole, directory)
    tree = list(init_weights.modules(whole))
    stage = Stage(whole, layers)
    if not rehearsed:
        check_parameters(settings, tensor_parallel.nbytes(stage), dtype, device)
    unset = init_weights.make(whole, tree, stage, device, seed)
    stored = stage.stored() if reads else {}
    check_values(settings, unset - set(stored))
    if directory is None:
        return stage
    for name in init_weights.in_full(whole, stored):
        stored[name].data = stored[name].data.float()
    with loading(str(settings.path)):
        if not (plain and init_weights.read(stored, directory)):
            host, how = torch.device("cpu"), (False, mesh, quantization)
            _copy(stored, stage.tied, loader.build(settings, config, dtype, host, seed, *how))
    return stage


def _copy(stored: Mapping[str, Tensor], tied: Mapping[str, Sequence[str]], whole: PreTrainedModel) -> None:
    """Fill `stored` from `whole`. Raises ValueError where that has parameters apart that should be `tied`."""
    found: dict[str, Tensor] = {
        **dict(whole.named_parameters(remove_duplicate=False)),
        **dict(whole.named_buffers()),
    }
    for name, others in tied.items():
        if any(found[other] is not found[name] for other in others):
            raise ValueError(
                f"{name} and {others[0]} differ in it, and its config ties them; say tie_word_embeddings=false there"
            )
    for name, held in stored.items():
        held.data.copy_(found[name])


def _text(config: PretrainedConfig) -> PretrainedConfig:
    return config.get_text_config(decoder=True)


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that has `path`, and its name there."""
    home, _, name = path.rpartition(".")
    return model.get_submodule(home), name


def _not_of(model: PreTrainedModel, path: str, first: bool, last: bool) -> Iterator[str]:
    """The modules beside the layers, and beside what holds them, that a stage has no use for."""
    parts = path.split(".")
    for depth in range(len(parts)):
        home = ".".join(parts[:depth])
        before = True
        for name, child in list(model.get_submodule(home).named_children()):
            if name == parts[depth]:
                before = False
                continue
            own = next(child.parameters(), None) is not None or "Norm" in type(child).__name__
            within = depth == len(parts) - 1
            if own and not (first if within and before else last):
                yield f"{home}.{name}".lstrip(".")


def _renumber(layers: list[nn.Module], first: int) -> None:
    """Layers look their cache up by number, and a stage's cache begins with its own first layer."""
    for layer in layers:
        for module in layer.modules():
            if isinstance(number := getattr(module, "layer_idx", None), int):
                module.layer_idx = number - first  # type: ignore[assignment]


def _configure(model: PreTrainedModel, layers: range, number: int) -> None:
    """A config of these layers alone, wherever the model keeps its config."""
    whole = model.config
    part = copy.deepcopy(whole)
    text = _text(part)
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == number:  # what each layer is
            setattr(text, key, value[layers.start : layers.stop])
    text.num_hidden_layers = len(layers)
    was = _text(whole)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is whole:
            module.config = part
        elif config is was:
            module.config = text
