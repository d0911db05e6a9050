"""`harness fit --html`: a map of what fits, each cell a config that was rehearsed or says that it was not."""

import json
import re
from html import unescape
from pathlib import Path

import pytest

from harness.__main__ import main
from harness.advice.fit.combination import Combination
from harness.advice.fit.map import cell_of, html
from harness.advice.fit.request import Request
from harness.advice.fit.search import search
from harness.advice.fit.trials import Trials
from harness.tables import size

LIMIT = 33_100_000
WORDS = [
    "precision=bf16",
    "model.attention=sdpa",
    "mode=train",
    "model=tiny",
    "world.size=2",
    "model.config.num_hidden_layers=2",
    f"hardware.memory={LIMIT}",
    "zero=0,3",
    "checkpointing=none",
]


def cells(page: str) -> dict[tuple[str, int], str]:
    """The text of each cell, by its row's head and its column."""
    columns = [
        int(value) for value in re.findall(r'<th scope="col">(\d+)</th>', page.partition("</thead>")[0])
    ]
    found: dict[tuple[str, int], str] = {}
    for section in page.split("<section>")[1:]:
        caption = re.search(r"<h2>(.*?)</h2>", section)
        for row in re.findall(r"<tr><th scope=\"row\">.*?</tr>", section, re.DOTALL):
            label = " ".join(filter(None, [caption and caption[1], re.findall(r'row">(.*?)</th>', row)[0]]))
            texts = [
                " ".join(unescape(re.sub(r"<[^>]*>", " ", cell)).split())
                for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)[1:]
            ]
            found |= {(unescape(label), column): text for column, text in zip(columns, texts, strict=True)}
    return found


def test_each_cell_says_whether_a_config_fits_how_much_it_needs_and_what_fills_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "map.html"
    words = [*WORDS, "train.sequence=32,64", "train.micro_batch=1,2,4,8"]
    assert main(["fit", *words, "--json", "--html", str(page)]) == 0
    trials = json.loads(capsys.readouterr().out)["trials"]
    actual = cells(page.read_text("utf-8"))
    assert {column for _, column in actual} == {1, 2, 4, 8}
    assert {label for label, _ in actual} == {"zero=0 32", "zero=0 64", "zero=3 32", "zero=3 64"}
    rehearsed = [trial for trial in trials if trial["peak"] is not None]
    assert rehearsed
    for trial in rehearsed:
        chosen = dict(word.partition("=")[::2] for word in trial["words"])
        cell = actual[f"zero={chosen['zero']} {chosen['train.sequence']}", int(chosen["train.micro_batch"])]
        fullest = max(trial["categories"], key=trial["categories"].get)
        assert cell == f"{'✓' if trial['fits'] else '✗'} {size(trial['peak'])} {fullest}"
    assert all(re.match(r"[✓✗] about ", cell) for cell in actual.values() if not re.match(r"[✓✗] \d", cell))


def test_what_shapes_rule_out_is_at_least_so_much(tmp_path: Path) -> None:
    page = tmp_path / "map.html"
    words = [
        *(word for word in WORDS if "memory" not in word),
        "hardware.memory=9000000",
        "train.sequence=32",
    ]
    assert main(["fit", *words, "zero.offload=none", "--html", str(page)]) == 1
    assert all(re.match(r"✗ at least \d.* optimizer$", cell) for cell in cells(page.read_text()).values())
    assert "Nothing that was tried fits" in page.read_text()


def test_a_text_of_the_user_is_escaped_and_nothing_is_loaded() -> None:
    answer = Trials(Request([*WORDS, "train.micro_batch=1", "model.name=<script>x</script>"])).answer(search)
    page = html(answer)
    assert "<script" not in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert not re.search(r"""(src|href)\s*=|url\(|@import""", page)


def test_a_cell_of_which_nothing_is_known_says_so() -> None:
    combination = Combination(("zero=1",), (), False, 1000)
    assert cell_of(combination, 4)[:3] == ("unknown", "not known", "")


@pytest.mark.parametrize("where", ["missing/map.html", "."])
def test_a_page_that_cannot_be_written_is_refused_before_the_search(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *WORDS, "--html", str(tmp_path / where)]) == 2
    reported = capsys.readouterr()
    assert reported.err.startswith(
        f"harness: --html {tmp_path / where}: give a file in a directory that exists"
    )
    assert (reported.err.count("\n"), reported.out) == (1, "")
