"""What a run will do: its settings without `auto`, and what follows from them. It is worked out once and goes down."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from transformers import PretrainedConfig

from harness.config.layout import Layout
from harness.config.settings import Settings
from harness.model.loader import model_config
from harness.model.partition import ranges, split_of


@dataclass(frozen=True)
class Plan:
    """`settings`, the model's config, and for each `auto` that was replaced its value and the reason, as `record.json`
    has it.
    """

    settings: Settings
    original_config: PretrainedConfig
    reasons: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Settings) -> "Plan":
        """The plan of `settings` as they are. Raises Refusal where there is no such model."""
        return cls(settings, model_config(settings.model))

    @property
    def config(self) -> PretrainedConfig:
        """A copy of the model's config: transformers changes the config that it builds a model of."""
        return copy.deepcopy(self.original_config)

    @property
    def number_of_layers(self) -> int:
        """The layers of the whole model."""
        number: int = self.original_config.get_text_config(decoder=True).num_hidden_layers
        return number

    @cached_property
    def split(self) -> list[int]:
        """The number of layers in each pipeline stage; `rehearsal/balance.py` has replaced `memory` by a list before.

        Raises Refusal where the model cannot be cut into so many stages.
        """
        return split_of(self.settings, self.config)

    @property
    def layers(self) -> list[range]:
        """The layer numbers of each pipeline stage. Raises Refusal as `split` does."""
        return ranges(self.split)

    @property
    def layout(self) -> Layout:
        """The place of every rank in a world of `world.size`, which must be set."""
        assert self.settings.world.size is not None
        return self.settings.layout(self.settings.world.size)

    def with_settings(self, **parts: Any) -> "Plan":
        """This plan with other `parts` of its settings, as `pipeline` or `train`. The model stays the same one."""
        return replace(self, settings=replace(self.settings, **parts))
