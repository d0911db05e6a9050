"""How long a report of many ranks takes to make, and to open in headless Chromium. Asserts nothing.

    python tests/benchmarks/report.py [ranks=64] [events=100000] [rounds=5]

`events` are of each rank. Opening is from navigation to the last chart, a fresh browser each round; it needs Debian's
chromium-driver.
"""

import platform
import random
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from harness.ledger.categories import CATEGORIES
from harness.record import record_file, trace
from harness.record.schema import parse
from harness.report import PAGE
from harness.report import main as report


def main(words: list[str]) -> None:
    own = {
        "ranks": 64,
        "events": 100_000,
        "rounds": 5,
        **{k: int(v) for k, v in (w.split("=") for w in words)},
    }
    with tempfile.TemporaryDirectory() as home:
        write_run(Path(home) / "run", own["ranks"], own["events"])
        took, opened = [], []
        for _ in range(own["rounds"]):
            began = time.perf_counter()
            report([str(Path(home) / "run"), "-o", str(Path(home) / "report")])
            took.append(time.perf_counter() - began)
            opened.append(seconds_to_open(Path(home) / "report" / PAGE))
        size = (Path(home) / "report" / PAGE).stat().st_size
    processor = record_file.environment().processor
    print(f"{processor}, python {platform.python_version()}, plotly {version('plotly')}")
    print(f"{own['ranks']} ranks, {own['events']:,} events each: a page of {size / 2**20:.1f} MiB")
    for what, seconds in (("made in", took), ("opened in", opened)):
        print(f"{what:<10} {statistics.median(seconds):5.2f} s   {min(seconds):.2f} to {max(seconds):.2f}")


def seconds_to_open(page: Path) -> float:
    """From navigation until everything is drawn."""
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(word)
    with webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver")) as browser:
        browser.get(page.as_uri())
        WebDriverWait(browser, 60, 0.01).until(
            lambda each: each.execute_script("return document.documentElement.dataset.ready") == "true"
        )
        return float(browser.execute_script("return performance.now()")) / 1000


def write_run(run: Path, ranks: int, events: int) -> None:
    """A run of so many ranks, each with a trace of so many random births and deaths."""
    run.mkdir()
    books = []
    for rank in range(ranks):
        table, peak = random_trace(random.Random(rank), events)
        trace.write(run, rank, table)
        books.append(
            {
                "rank": rank,
                "stands_for": [rank],
                "peak": {"bytes": sum(peak.values()), "where": None, "categories": peak},
                "categories": {name: {"peak": measured, "end": 0} for name, measured in peak.items()},
                "allocator": {"source": None, "peak": None, "unattributed": None},
            }
        )
    head = {"status": "complete", "mode": "train", "ranks": books}
    world = {"size": ranks, "device": "cpu"}
    model = {"name": "made", "parameters": None, "dtype": None}
    record_file.write(run, parse({**head, "world": world, "model": model}, "it"))


def random_trace(chance: random.Random, events: int) -> tuple[pa.Table, dict[str, int]]:
    """A trace, and each category's bytes at its peak."""
    alive: list[tuple[int, str, str, int]] = []
    rows, live = [], dict.fromkeys(CATEGORIES, 0)
    highest, at_peak = 0, dict(live)
    for number in range(events):
        module = f"model.layers.{number * 80 // events}.mlp"
        born = len(alive) < 20 or chance.random() < 0.5
        if born:
            alive.append((number, chance.choice(CATEGORIES), module, chance.randrange(1, 2**20)))
        each = alive[-1] if born else alive.pop(chance.randrange(len(alive)))
        storage, category, _, nbytes = each
        live[category] += nbytes if born else -nbytes
        if sum(live.values()) > highest:
            highest, at_peak = sum(live.values()), dict(live)
        phase = ("forward", "backward", "step")[number * 30 // events % 3]
        rows.append(
            (
                number * 10 // events,
                phase,
                0,
                module,
                "mm",
                category,
                "",
                storage,
                nbytes if born else -nbytes,
            )
        )
    columns = dict(zip(trace.COLUMNS, map(list, zip(*rows, strict=True)), strict=False))
    columns |= {"saved": [0] * events, "nanoseconds": list(range(events))}
    return pa.table(columns, schema=trace.schema()), at_peak


if __name__ == "__main__":
    main(sys.argv[1:])
