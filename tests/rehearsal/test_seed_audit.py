"""profiles/seed-audit.md, computed anew: every example, and what the page takes for granted of the model."""

from pathlib import Path

import pytest

from harness.config.compose import compose
from harness.config.load import load
from harness.model import init_weights
from harness.model.loader import model_config
from tests.benchmarks import seed_audit as audit
from tests.pages import installed_as_pinned, pinned

PAGE = (Path(__file__).parents[2] / "profiles" / "seed-audit.md").read_text()
EXAMPLES = (
    audit.training,
    audit.stages,
    audit.cache_bytes,
    audit.cache_operations,
    audit.per_byte,
    audit.reads,
    audit.operations,
    audit.bandwidth,
    audit.ratio,
    audit.ratios,
    audit.waiting,
    audit.prompts,
    audit.training_links,
    audit.inference_links,
    audit.link_bound,
)

COSTLY = {
    *(
        audit.training,
        audit.cache_bytes,
        audit.cache_operations,
        audit.per_byte,
        audit.bandwidth,
        audit.ratios,
        audit.training_links,
        audit.inference_links,
        audit.link_bound,
    )
}
"""Whole models again, with other batches and contexts. The rest are of every kind of figure that is computed."""

same_versions = pytest.mark.skipif(
    not installed_as_pinned("torch", "transformers", "deepspeed"),
    reason="the page is of the versions in constraints.txt, and others are installed here",
)


def test_the_page_is_of_the_versions_that_the_tests_run_on() -> None:
    assert [line for line in pinned("torch", "transformers", "deepspeed") if line not in PAGE] == []


@same_versions
@pytest.mark.parametrize(
    ("number", "example"),
    [
        pytest.param(number, example, marks=[pytest.mark.exhaustive] if example in COSTLY else [])
        for number, example in enumerate(EXAMPLES, 1)
    ],
)
def test_an_example_on_the_page_is_what_is_computed(number: int, example: audit.Computed) -> None:
    assert audit.section_of(example(), number) in PAGE


def test_the_page_has_every_example() -> None:
    assert tuple(audit.EXAMPLES) == EXAMPLES
    assert PAGE.count("\n## ") == len(EXAMPLES)


def test_the_real_model_has_the_parameters_and_the_shape_that_the_page_takes_it_to_have() -> None:
    config = model_config(load(compose(["mode=infer", "model=llama2-70b"])).model)
    whole = init_weights.outline(config, config.dtype)
    assert sum(parameter.numel() for parameter in whole.parameters()) == audit.PARAMETERS
    assert (config.num_hidden_layers, config.hidden_size) == (audit.LAYERS, audit.HIDDEN)
    assert (config.num_attention_heads, config.num_key_value_heads) == (audit.ASSUMED, audit.REAL)


def test_keys_and_values_take_what_their_projections_do() -> None:
    for heads in (audit.ASSUMED, audit.REAL):
        width = heads * audit.HIDDEN // 64
        assert audit.projections(heads) == audit.LAYERS * 2 * 2 * audit.HIDDEN * width
