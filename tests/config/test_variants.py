"""A config that is put together from what each override changes is the one that Hydra composes of all of them."""

import random
from itertools import product
from pathlib import Path

import pytest

from harness.config.compose import compose
from harness.config.load import resolved
from harness.config.settings import Refusal
from harness.config.variants import Variants

AXES = {
    "zero": ("0", "1", "3"),
    "zero.offload": ("none", "optimizer"),
    "checkpointing": ("none", "full"),
    "checkpointing.offload": ("none", "cpu"),
    "loss": ("full", "chunked"),
    "optimizer": ("adamw", "lion", "muon"),
    "optimizer.state": ("fp32", "bf16"),
    "adapter": ("none", "lora"),
    "train.sequence": ("64", "1024"),
    "train.micro_batch": ("1", "16"),
    "world.size": ("1", "8"),
}
BASES = (
    (),
    ("model=small", "mode=train", "train.weight_decay=0.5", "world=rehearsed"),
    ("mode=infer", "hardware=h100-sxm", "hardware.memory=9e9", "zero.offload=all"),
    ("model=small", "seed=7", "model.name=a-${seed}"),
)


@pytest.mark.parametrize("base", BASES)
def test_a_config_is_what_hydra_composes_of_all_overrides(base: tuple[str, ...]) -> None:
    variants, chosen = Variants(base), random.Random(3)
    every = [*product(*([f"{key}={value}" for value in values] for key, values in AXES.items()))]
    for more in chosen.sample(every, 6):
        assert variants.tree(*more) == resolved(compose([*base, *more]))


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("network=infiniband-hdr200", "network.name=auto"),  # which is its value without the option
        ("network=infiniband-hdr200", "network.name=mine"),
        ("hardware=h100-sxm", "hardware.memory=null"),
        ("zero=3", "zero.stage=2"),
    ],
)
def test_a_key_comes_after_an_option_that_sets_it(option: str, key: str) -> None:
    variants = Variants([])
    expected = resolved(compose([option, key]))
    assert variants.tree(option, key) == variants.tree(key, option) == expected
    assert expected != variants.tree(option)


@pytest.mark.parametrize(
    ("base", "more"), [(["model=nosuch"], []), ([], ["zero=1", "loss=nosuch"]), ([], ["zero.nosuch=1"])]
)
def test_what_hydra_refuses_is_refused_each_time(base: list[str], more: list[str]) -> None:
    variants = Variants(base)
    with pytest.raises(Refusal) as expected:
        compose([*base, *more])
    for _ in range(2):
        with pytest.raises(Refusal) as actual:
            variants.tree(*more)
        assert str(actual.value) == str(expected.value)


def test_what_a_user_s_own_config_says_of_another_key_is_not_lost(tmp_path: Path) -> None:
    own = "defaults: [config, _self_]\ntrain: {accumulation: '${train.micro_batch}'}\n"
    (tmp_path / "mine.yaml").write_text(own)
    base = [f"--config-dir={tmp_path}", "--config-name=mine"]
    assert resolved(compose([*base, "train.micro_batch=8"]))["train"]["accumulation"] == 8
    assert Variants(base).tree("zero=3", "train.micro_batch=8")["train"]["accumulation"] == 8
