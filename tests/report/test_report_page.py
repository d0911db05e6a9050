"""The page in a browser: it opens without an error, and what a person points at, chooses or types is answered."""

import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from harness.record import trace
from harness.record.record_file import FILE, read
from harness.report import PAGE
from tests.report.test_report import HOSTILE, changed, report

Browser = webdriver.Chrome


@pytest.fixture(scope="module")
def page(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a run of each mode, one of them with texts that would run."""
    home = tmp_path_factory.mktemp("page")
    for name, run in runs.items():
        shutil.copytree(run, home / name)
    record = read(home / "infer")
    record["model"]["name"] = HOSTILE
    record["ranks"][0]["peak"]["where"]["module"] = HOSTILE
    (home / "infer" / FILE).write_text(json.dumps(record))
    table = trace.read(home / "infer", 0)
    assert table is not None
    hostile = pa.array([HOSTILE] * table.num_rows)
    trace.write(home / "infer", 0, table.set_column(table.column_names.index("module"), "module", hostile))
    return report(home / "report", home / "train", home / "infer") / PAGE


def opened(browser: Browser, page: Path) -> Browser:
    browser.get(page.as_uri())
    WebDriverWait(browser, 60).until(
        lambda each: each.execute_script("return document.documentElement.dataset.ready") == "true"
    )
    return browser


def cursor(browser: Browser) -> str:
    return browser.find_element(By.ID, "cursor").text


def chosen(browser: Browser, what: str) -> Select:
    return Select(browser.find_element(By.ID, what))


def test_it_opens_without_a_word_on_the_console_and_runs_nothing_of_a_record(
    browser: Browser, page: Path
) -> None:
    opened(browser, page)
    chosen(browser, "run").select_by_index(1)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.hacked") is None
    assert HOSTILE in cursor(browser)


def test_every_chart_is_drawn(browser: Browser, page: Path) -> None:
    opened(browser, page)
    for chart in ("timeline", "ranks"):
        assert browser.execute_script("return document.getElementById(arguments[0]).data.length", chart) > 1
    names = browser.execute_script("return document.getElementById('timeline').data.map(each => each.name)")
    assert {"parameters", "optimizer", "activations", "saved for backward", "alive"} <= set(names)


def test_a_run_that_was_timed_is_under_its_machines_roof(
    browser: Browser, page: Path, tmp_path: Path
) -> None:
    rate = {"source": "made", "bandwidth": 1e9, "flops": 1e12, "dtype": "bfloat16"}
    run = changed(page.parents[1] / "train", tmp_path / "run", lambda record: record.update(ceilings=rate))
    opened(browser, report(tmp_path / "report", run) / PAGE)
    assert browser.find_element(By.ID, "roofline").is_displayed()
    roof = browser.execute_script("return document.getElementById('roofline').data[0].y")
    assert max(roof) == 1e12


def test_pointing_says_what_lives_there_and_names_the_module(browser: Browser, page: Path) -> None:
    opened(browser, page)
    chart = browser.find_element(By.CSS_SELECTOR, "#timeline .nsewdrag")
    reported = [cursor(browser)]
    for across in (-200, 100):
        ActionChains(browser).move_to_element_with_offset(chart, across, 0).perform()
        WebDriverWait(browser, 20).until(lambda each: cursor(each) not in reported)
        reported.append(cursor(browser))
        assert re.search(r" alive: step \d, \w+, micro-batch \d, \w", reported[-1].splitlines()[0])
        assert re.search(r"\n  \w+: \S.*  [\d.]+ [KM]iB$", reported[-1])


def test_keys_walk_the_timeline(browser: Browser, page: Path) -> None:
    opened(browser, page)
    chart = browser.find_element(By.ID, "timeline")
    at_peak = cursor(browser)
    peak = read(page.parents[1] / "train")["ranks"][0]["peak"]["bytes"]
    assert at_peak.startswith(f"{peak / 2**20:.1f} MiB alive")
    chart.send_keys(Keys.HOME)
    start = cursor(browser)
    chart.send_keys(Keys.ARROW_RIGHT)
    assert len({at_peak, start, cursor(browser)}) == 3
    chart.send_keys(Keys.ARROW_LEFT)
    assert cursor(browser) == start
    chart.send_keys(Keys.PAGE_DOWN)
    next_phase = cursor(browser)
    assert "step 0, setup" in next_phase or "step 0, data" in next_phase
    chart.send_keys(Keys.PAGE_DOWN)
    assert "step 0, forward" in cursor(browser)
    chart.send_keys(Keys.END)
    chart.send_keys("p")
    assert cursor(browser) == at_peak


def test_choosing_a_run_and_a_rank_changes_what_is_told(browser: Browser, page: Path) -> None:
    opened(browser, page)
    assert "train tiny" in browser.find_element(By.CSS_SELECTOR, "section[data-run]:not([hidden]) h2").text
    chosen(browser, "run").select_by_index(1)
    assert "infer" in browser.find_element(By.CSS_SELECTOR, "section[data-run]:not([hidden]) h2").text
    first = read(page.parents[1] / "infer")["ranks"][0]
    assert chosen(browser, "rank").first_selected_option.text.startswith(str(first["rank"]))
    assert "prefill" in cursor(browser) or "decode" in cursor(browser)


def test_modules_are_found_and_told_layer_by_layer(browser: Browser, page: Path) -> None:
    opened(browser, page)
    browser.find_element(By.ID, "find").send_keys("down_proj")
    rows = [row.text for row in browser.find_elements(By.CSS_SELECTOR, "#modules tbody th")]
    assert rows == ["model.layers.*.mlp.down_proj"]
    browser.find_element(By.ID, "fold").click()
    rows = [row.text for row in browser.find_elements(By.CSS_SELECTOR, "#modules tbody th")]
    assert sorted(rows) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


def test_it_is_read_in_the_dark(browser: Browser, page: Path) -> None:
    opened(browser, page)
    looks = (
        "return [getComputedStyle(document.body).backgroundColor,"
        " document.getElementById('timeline').layout.font.color]"
    )
    light = browser.execute_script(looks)
    browser.find_element(By.ID, "theme").click()
    dark = browser.execute_script(looks)
    assert light != dark
    assert dark[0] == "rgb(20, 22, 26)"
    assert browser.get_log("browser") == []
