"""The generation config that a checkpoint brings, read as it is in its files."""

from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from harness.config.generation_fields import HONOURED, KNOWN, REFUSED
from harness.config.rules.sources import generation_fields
from harness.config.settings import Model
from harness.model import loader


def fields_of(settings: Model, config: PretrainedConfig) -> dict[str, Any]:
    """The fields of the generation config that the checkpoint brings; a model without one has those of its `config`."""
    if settings.path is not None:
        with loader.loading(settings.path):
            return generation_fields(str(loader.directory_of(settings.path)), KNOWN)
    given = GenerationConfig.from_model_config(config).to_dict()
    return {name: given[name] for name in (*HONOURED, *REFUSED) if given.get(name) is not None}
