"""DeepSpeed's own classes and readers know no key that the table does not have."""

from collections.abc import Iterator
from typing import Any

import pytest

from harness.config.deepspeed_keys import KEYS, ZERO

pytest.importorskip("deepspeed")


def known(key: str) -> bool:
    """Whether the table has a key, or the section that it is in."""
    parts = key.split(".")
    return any(".".join(parts[:length]) in KEYS for length in range(1, len(parts) + 1))


class Asked(dict[str, Any]):
    """A config that notes every key that a reader looks for."""

    def __init__(self, tree: dict[str, Any], names: set[str]) -> None:
        super().__init__(tree)
        self.names = names

    def __copy__(self) -> "Asked":
        return self

    def __contains__(self, key: object) -> bool:
        self.names.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self


def fields(section: str, model: Any) -> Iterator[str]:
    """The keys of one of DeepSpeed's classes."""
    for name, field in model.model_fields.items():
        yield f"{section}{name}"
        if field.alias:
            yield f"{section}{field.alias}"


def test_every_key_that_deepspeed_looks_for_is_known() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    names: set[str] = set()
    DeepSpeedConfig(Asked({"train_batch_size": 1}, names))
    sections = {key.partition(".")[0] for key in KEYS}
    assert {"optimizer", "zero_optimization", "aio", "amp"} <= names
    assert names - sections == set()


def test_every_field_of_deepspeed_s_classes_is_known() -> None:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero import config, offload_config

    names = [
        *fields(ZERO, config.DeepSpeedZeroConfig),
        *fields(f"{ZERO}offload_optimizer.", offload_config.DeepSpeedZeroOffloadOptimizerConfig),
        *fields(f"{ZERO}offload_param.", offload_config.DeepSpeedZeroOffloadParamConfig),
        *fields("bf16.", DeepSpeedBF16Config),
        *fields("fp16.", DeepSpeedFP16Config),
    ]
    sections = (f"{ZERO}offload_optimizer", f"{ZERO}offload_param")
    assert [name for name in names if not known(name) and name not in sections] == []


def test_the_sections_that_are_read_as_mappings_are_known() -> None:
    from deepspeed.runtime import constants
    from deepspeed.runtime.activation_checkpointing import config as recomputed
    from deepspeed.runtime.config import get_pipeline_config

    names = [f"pipeline.{key}" for key in get_pipeline_config({})]
    names += [f"activation_checkpointing.{key}" for key in recomputed.ACT_CHKPT_DEFAULT]
    data_types = ("GRAD_ACCUM_DTYPE", "PARAM_DTYPE", "BUFFER_DTYPE", "KEEP_IN_FP32_MODULES")
    names += [f"data_types.{getattr(constants, key)}" for key in data_types]
    assert [name for name in names if not known(name)] == []


def test_deepspeed_s_defaults_are_those_of_the_table() -> None:
    from deepspeed.runtime.config import get_gradient_clipping
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    actual = DeepSpeedZeroConfig()
    for name in (
        *("stage", "reduce_bucket_size", "allgather_bucket_size", "prefetch_bucket_size"),
        "param_persistence_threshold",
    ):
        assert KEYS[f"{ZERO}{name}"].default == getattr(actual, name)  # type: ignore[union-attr]
    assert KEYS["gradient_clipping"].default == get_gradient_clipping({})  # type: ignore[union-attr]
    assert DeepSpeedZeroConfig(stage=3).overlap_comm is True
    assert DeepSpeedZeroConfig(stage=2).overlap_comm is False
