"""A page of many runs and both modes in a browser: what is first, what sorts and filters, on a phone and on paper."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from harness.record.record_file import FILE, read
from harness.report import PAGE
from tests.report.test_report import HOSTILE, report
from tests.report.test_report_page import Browser, opened

STAGES, SIZES = (0, 1, 2, 3), (1, 2, 16)
PHONE, PAPER = 390, 718
"""The width of a phone, and of a sheet of A4 between its margins, in pixels."""

CUT = """
return [...document.querySelectorAll("main .scroll, main table, main .chart")].filter((each) => each.offsetParent && (
  (each.scrollHeight > each.clientHeight + 2 && getComputedStyle(each).overflow !== "visible")
  || each.getBoundingClientRect().right > arguments[0] + 1)).map((each) => each.id || each.className)
"""
"""What is cut off, or ends right of a sheet that is so wide."""


@pytest.fixture(scope="module")
def page(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve runs that train and one that generates; one of them failed, and has texts that would run."""
    home = tmp_path_factory.mktemp("many")
    record = read(runs["train"])
    paths = [put(home / f"{stage}-{size}", swept(record, stage, size)) for stage in STAGES for size in SIZES]
    return report(home / "report", *paths, runs["infer"]) / PAGE


def swept(record: dict[str, Any], stage: int, size: int) -> dict[str, Any]:
    """The record of a run with these settings, each with a peak of its own."""
    other = copy.deepcopy(record)
    other["config"]["zero"]["stage"], other["config"]["train"]["micro_batch"] = stage, size
    for rank in other["ranks"]:
        rank["peak"]["categories"]["activations"] += size * 2**22 - stage * 2**10
        rank["peak"]["bytes"] += size * 2**22 - stage * 2**10
    if (stage, size) == (3, 16):
        other |= {"status": "failed", "failure": {"error": HOSTILE}, "ranks": []}
    return other


def put(directory: Path, record: dict[str, Any]) -> Path:
    directory.mkdir()
    (directory / FILE).write_text(json.dumps(record))
    return directory


def rows(browser: Browser, column: int) -> list[str]:
    """The cells of a column, of the rows that are shown."""
    script = (
        "return [...document.querySelectorAll('#runs-table tbody tr')]"
        ".filter(row => row.offsetParent).map(row => row.cells[arguments[0]].textContent.trim())"
    )
    return list(browser.execute_script(script, column))


def sized(browser: Browser, width: int, media: str = "") -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media})


@pytest.fixture
def restored(browser: Browser) -> Any:
    """The browser, which is as wide as before when the test is over."""
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def too_wide(browser: Browser) -> int:
    """By how many pixels the page is wider than its window."""
    script = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    return int(browser.execute_script(script))


def test_the_contrast_is_first_and_its_bars_have_one_scale(browser: Browser, page: Path) -> None:
    opened(browser, page)
    first = browser.find_element(By.CSS_SELECTOR, "main > section")
    assert first.get_attribute("id") == "contrast"
    titles = [each.text for each in first.find_elements(By.CSS_SELECTOR, ".group th")]
    assert titles[0].startswith("Only in training")
    assert titles[1].startswith("Only in generation")
    assert titles[2] == "In both"
    pixels = browser.execute_script(
        "return [...document.querySelectorAll('#contrast .all td')].map(cell => ["
        "[...cell.querySelectorAll('.bar > span')].reduce((sum, part) => sum + part.getBoundingClientRect().width, 0),"
        "cell.querySelector('.told').textContent])"
    )
    (trained, train_told), (generated, infer_told) = pixels
    told = [float(text.split()[0]) for text in (train_told, infer_told)]
    assert trained / generated == pytest.approx(told[0] / told[1], rel=0.05)


def test_what_only_one_mode_has_is_marked_in_words(browser: Browser, page: Path) -> None:
    opened(browser, page)
    only = {
        mode: [
            (
                row.find_element(By.TAG_NAME, "th").text.splitlines()[0],
                row.find_elements(By.CLASS_NAME, "none"),
            )
            for row in browser.find_elements(By.CSS_SELECTOR, f"#contrast .only-{mode} tr:not(.group)")
        ]
        for mode in ("train", "infer")
    }
    assert {"optimizer", "gradients", "activations saved for backward"} <= {name for name, _ in only["train"]}
    assert [name for name, _ in only["infer"]] == ["kv_cache"]
    assert all([each.text for each in empty] == ["none"] for mode in only.values() for _, empty in mode)


def test_columns_sort_by_mouse_and_by_key_and_say_so(browser: Browser, page: Path) -> None:
    opened(browser, page)
    heads = browser.find_elements(By.CSS_SELECTOR, "#runs-table thead th")
    names = [head.text for head in heads]
    size, peak = names.index("micro_batch"), names.index("peak")
    heads[size].find_element(By.TAG_NAME, "button").click()
    assert rows(browser, size) == [*sorted(map(str, [1, 2, 16] * 4), key=int), ""]
    assert heads[size].get_attribute("aria-sort") == "ascending"
    button = heads[peak].find_element(By.TAG_NAME, "button")
    button.send_keys(Keys.ENTER)
    ascending = rows(browser, peak)
    button.send_keys(Keys.ENTER)
    descending = rows(browser, peak)
    assert [head.get_attribute("aria-sort") for head in (heads[size], heads[peak])] == ["none", "descending"]
    assert ascending[-1] == descending[-1] == "-"
    assert ascending[:-1] == descending[-2::-1]
    assert rows(browser, names.index("run"))[-1].endswith("failed")


def test_words_filter_the_runs_and_a_click_chooses_one(browser: Browser, page: Path) -> None:
    opened(browser, page)
    field = browser.find_element(By.ID, "filter")
    field.send_keys("zero=3 micro_batch=2")
    assert browser.find_element(By.ID, "filtered").text == "1 of 13"
    (button,) = [each for each in browser.find_elements(By.CLASS_NAME, "choose") if each.is_displayed()]
    button.click()
    chosen = Select(browser.find_element(By.ID, "run")).first_selected_option.text
    assert chosen == browser.find_element(By.CSS_SELECTOR, ".about:not([hidden]) h2").text
    assert chosen.endswith("zero=3 micro_batch=2")
    field.clear()
    field.send_keys("nothing is named so")
    assert browser.find_element(By.ID, "filtered").text == "0 of 13"
    for word, count in (("micro_batch=1", 4), ("train.micro_batch=16", 4), ("batch=", 12)):
        field.clear()
        field.send_keys(word)
        assert browser.find_element(By.ID, "filtered").text == f"{count} of 13"


def test_a_series_has_a_bar_for_each_run_in_order_and_one_scale(browser: Browser, page: Path) -> None:
    opened(browser, page)
    tables = browser.find_elements(By.CSS_SELECTOR, ".panels .panel")
    captions = [each.find_element(By.TAG_NAME, "caption").text for each in tables]
    assert captions == ["micro_batch=1", "micro_batch=2", "micro_batch=16"]
    last = [cell.text for cell in tables[2].find_elements(By.TAG_NAME, "th")]
    assert last[:3] == ["zero=0", "zero=1", "zero=2"]
    assert "failed" in last[3]
    bars = tables[0].parent.find_elements(By.CSS_SELECTOR, ".panels .bar")
    assert len({round(bar.rect["width"]) for bar in bars}) == 1
    assert browser.execute_script("return window.hacked") is None
    assert browser.get_log("browser") == []


def test_what_moves_is_told_in_words_beside_its_bars(restored: Browser, page: Path) -> None:
    for width in (PHONE, 1200):
        sized(restored, width)
        opened(restored, page)
        section = restored.find_element(By.ID, "moves")
        rows = section.find_elements(By.CSS_SELECTOR, ".moving tr")
        assert rows
        for row in rows:
            told = row.find_element(By.CSS_SELECTOR, "td .dim")
            parts = row.find_elements(By.CSS_SELECTOR, ".bar > span")
            assert told.is_displayed()
            assert told.text == ", ".join(str(part.get_attribute("title")) for part in parts) or not parts
            assert row.find_element(By.TAG_NAME, "th").size["width"] > 60


def test_a_phone_needs_no_scrolling_across(restored: Browser, page: Path) -> None:
    sized(restored, PHONE)
    opened(restored, page)
    assert restored.execute_script("return innerWidth") == PHONE
    assert too_wide(restored) <= 0
    ends = "[...document.querySelectorAll('.chart')].map(each => each.getBoundingClientRect().right)"
    assert restored.execute_script(f"return Math.max(...{ends})") <= PHONE


def test_paper_has_all_of_it_and_cuts_nothing_off(restored: Browser, page: Path) -> None:
    opened(restored, page)
    restored.find_element(By.ID, "theme").click()
    restored.find_element(By.ID, "filter").send_keys("zero=3")
    sized(restored, PAPER, "print")
    restored.execute_script("dispatchEvent(new Event('beforeprint'))")
    closed = "return document.querySelectorAll('details:not([open])').length"
    assert restored.execute_script(closed) == 0
    assert len(rows(restored, 0)) == 13
    assert all(each.is_displayed() for each in restored.find_elements(By.CLASS_NAME, "about"))
    body = restored.find_element(By.TAG_NAME, "body")
    assert body.value_of_css_property("background-color") == "rgba(255, 255, 255, 1)"
    assert too_wide(restored) <= 0
    assert restored.execute_script(CUT, PAPER) == []
    restored.execute_script("dispatchEvent(new Event('afterprint'))")
    assert restored.execute_script(closed) > 0
