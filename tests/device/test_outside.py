"""What is left for torch on a card: each figure has its source, and what is not known is not subtracted."""

import re
from collections.abc import Iterator

import pytest

from harness.config import hardware_page
from harness.config.compose import compose, groups
from harness.config.load import load
from harness.config.settings import Hardware
from harness.device.outside import CONTEXTS, NCCL, Budget, Measured, Outside, budget, outside
from harness.tables import size
from tests.pages import DOCS

CARDS = sorted(set(groups()["hardware"]) - {"auto", "cpu"})
MIB = 2**20


def hardware(*words: str) -> Hardware:
    """The hardware that the words on a command line come to."""
    return load(compose(words)).hardware


def formed(world_size: int, *words: str) -> Budget:
    """The budget of a device of `hardware(*words)`."""
    result = budget(hardware(*words), world_size)
    assert result is not None
    return result


# -- the figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CARDS)
def test_a_figure_of_a_page_has_its_source_and_what_has_none_is_null(name: str) -> None:
    page = hardware_page.named(name)
    for key in ("memory_driver", "memory_torch"):
        assert (getattr(page, key) is None) == (key not in page.sources)
    assert (page.host_link is None) == ("host_link" not in page.sources)
    assert set(page.sources) <= {"memory_driver", "memory_torch", "host_link", "rates"}


@pytest.mark.parametrize("name", CARDS)
def test_torch_sees_less_than_the_driver_prints(name: str) -> None:
    page = hardware_page.named(name)
    if page.memory_driver is not None and page.memory_torch is not None:
        assert 0.98 * page.memory_driver < page.memory_torch < page.memory_driver
    assert page.memory is not None
    for figure in (page.memory_driver, page.memory_torch):
        assert figure is None or 0.93 * page.memory < figure < 1.1 * page.memory


def test_every_card_says_whether_its_context_is_known_and_what_is_known_has_its_source() -> None:
    assert sorted(CONTEXTS) == CARDS
    for measured in (*CONTEXTS.values(), *NCCL.values()):
        assert measured is None or (measured.bytes > 0 and measured.source.startswith("https://"))
        assert measured is None or "MB" in measured.precision or "iB" in measured.precision
    assert {card for card, _ in NCCL} <= set(CARDS)


# -- what is subtracted ------------------------------------------------------------------------------------------------


def test_nccl_is_known_only_for_the_worlds_that_were_measured() -> None:
    measured = [outside("a100-80gb", ranks).nccl for ranks in (1, 2, 3, 4, 5)]
    assert [each and each.bytes for each in measured] == [None, 544 * MIB, 688 * MIB, 688 * MIB, None]


def test_a_card_that_is_in_no_table_has_nothing_known() -> None:
    assert outside("mycard", 2) == Outside(None, None)
    assert outside("mycard", 2).bytes == 0


@pytest.mark.parametrize("ranks", [0, -1])
def test_a_world_without_ranks_is_refused(ranks: int) -> None:
    with pytest.raises(ValueError, match=f"world_size={ranks}: a world has one rank or more"):
        outside("h100-sxm", ranks)


def test_what_is_known_is_subtracted_from_what_torch_sees() -> None:
    actual = formed(4, "hardware=a100-80gb")
    context = CONTEXTS["a100-80gb"]
    assert context is not None
    assert actual.bytes == 84_987_740_160 - context.bytes - 688 * MIB
    assert f"79.2 GiB that torch sees, less {size(context.bytes)} of CUDA context ({context.source})" in (
        actual.sentence()
    )
    assert "--reserve" not in actual.sentence()


def test_what_is_not_known_is_not_subtracted_and_said() -> None:
    actual = formed(8, "hardware=h100-sxm")
    assert actual.bytes == actual.total == 81_089 * MIB
    assert actual.sentence() == (
        "79.2 GiB a device: 79.2 GiB that torch sees; "
        "CUDA context and NCCL: not known here and not subtracted; --reserve is for it"
    )


def test_the_driver_s_figure_counts_where_torch_s_has_no_source() -> None:
    actual = formed(1, "hardware=l4")
    assert (actual.source, actual.total) == ("driver", 23_034 * MIB)


@pytest.mark.parametrize("page", ["a100-80gb", "h100-sxm", "l4", "auto", "cpu"])
@pytest.mark.parametrize("memory", [80_000_000_000, 1000])
def test_a_memory_from_the_user_is_the_budget_itself(page: str, memory: int) -> None:
    actual = formed(4, f"hardware={page}", f"hardware.memory={memory}")
    assert actual == Budget(memory, "hardware.memory", None)
    assert actual.bytes == memory


def test_torch_s_figure_from_the_user_counts_beside_a_memory() -> None:
    words = ("hardware=a100-80gb", "hardware.memory=1000", f"hardware.memory_torch={2**33}")
    assert formed(1, *words).total == 2**33


@pytest.mark.parametrize("page", ["auto", "cpu"])
def test_a_device_without_a_memory_has_no_budget(page: str) -> None:
    assert budget(hardware(f"hardware={page}"), 1) is None


# -- what the docs show ------------------------------------------------------------------------------------------------


def shown() -> Iterator[str]:
    """The rows of the table of cards in docs/rehearse.md."""
    for name in CARDS:
        page, context = hardware_page.named(name), CONTEXTS[name]
        figures = [page.memory_driver, page.memory_torch, context and context.bytes]
        cells = [f"{(page.memory or 0) / 1e9:.0f} GB", *map(mebibytes, figures)]
        links = [
            page.sources.get("memory_driver"),
            page.sources.get("memory_torch"),
            context and context.source,
        ]
        yield f"| {' | '.join([name, *cells])} | {sources(*links)} |"


def mebibytes(figure: int | None) -> str:
    return "-" if figure is None else f"{figure // MIB:,}"


def sources(*links: str | None) -> str:
    names = ("nvidia-smi", "torch", "context")
    return ", ".join(f"[{name}]({link})" for name, link in zip(names, links, strict=True) if link)


def test_the_table_of_cards_is_that_of_the_pages() -> None:
    text = (DOCS / "rehearse.md").read_text()
    rows = re.findall(rf"^\| (?:{'|'.join(CARDS)}) \|.*$", text, re.MULTILINE)
    assert rows == [*shown()], "\n".join(["docs/rehearse.md should have", *shown()])


def test_a_sum_is_of_what_is_known() -> None:
    one = Measured(5, "https://a", "1 MiB")
    assert [Outside(one, None).bytes, Outside(None, one).bytes, Outside(one, one).bytes] == [5, 5, 10]
