"""Runs that are rehearsed once, and one browser, for every test of the report."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver

from harness.__main__ import main

TINY = "model=tiny hardware=cpu world=rehearsed world.size=2 model.config.num_hidden_layers=2"
TRAIN = f"mode=train zero=2 train.steps=2 train.sequence=32 train.validate_every=0 {TINY}"
INFER = f"mode=infer generation.batch=2 generation.max_new_tokens=4 {TINY}"


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A rehearsed run of each mode."""
    home = tmp_path_factory.mktemp("runs")
    for name, words in (("train", TRAIN), ("infer", INFER)):
        assert main([*words.split(), f"hydra.run.dir={home / name}"]) == 0
    return {name: home / name for name in ("train", "infer")}


@pytest.fixture(scope="session")
def browser() -> Iterator[webdriver.Chrome]:
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no chromedriver on PATH: Debian has it in chromium-driver")
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1000"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as browser:
        yield browser
