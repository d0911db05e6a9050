"""The checkpoint's generation config, read unchanged from its files."""

from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from harness.config.generation_fields import HONOURED, KNOWN, REFUSED
from harness.config.rules.sources import generation_fields
from harness.config.settings import Model
from harness.model import loader


def fields_of(settings: Model, config: PretrainedConfig) -> dict[str, Any]:
    """The fields of the checkpoint's generation config; without a checkpoint, those in the model's `config`."""
    if settings.path is not None:
        with loader.loading(settings.path):
            return generation_fields(str(loader.directory_of(settings.path)), KNOWN)
    defaults = GenerationConfig.from_model_config(config).to_dict()
    return {name: defaults[name] for name in (*HONOURED, *REFUSED) if defaults.get(name) is not None}
