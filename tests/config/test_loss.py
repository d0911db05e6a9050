"""What a loss needs of the packages that are installed."""

import pytest

from harness.config.compose import compose
from harness.config.load import Refusal, load
from harness.config.rules import loss, packages


@pytest.mark.parametrize("release", ["2.11.0", "2.12.1+cu130"])
def test_a_loss_in_chunks_is_refused_with_the_torch_that_has_it(
    monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    monkeypatch.setattr(loss, "version", lambda package: release)
    with pytest.raises(Refusal) as refused:
        load(compose(["loss=chunked"]))
    assert str(refused.value) == (
        f"loss=chunked: it needs torch 2.13, and {release} is installed; use loss=full"
    )
    load(compose(["loss=full"]))


def test_kernels_that_are_not_installed_are_refused_with_the_extra_that_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda package: None)
    with pytest.raises(Refusal, match=r"loss=fused: liger_kernel is not installed; .*'harness\[fused\]'"):
        load(compose(["loss=fused", "hardware=h100-sxm"]))
