"""How long a step waits for what its ranks send, from records and efficiencies that are made up."""

import json
from pathlib import Path
from typing import Any

import pytest

from harness.__main__ import main
from harness.analysis.speed import link_fit
from harness.analysis.speed.communication import of_step
from harness.analysis.speed.efficiency import Fit, LinkEfficiency
from harness.analysis.speed.estimate import Estimate, Interval
from harness.analysis.speed.link_fit import Sent
from harness.analysis.speed.roofline_model import Bound
from harness.record.results import Ceilings
from harness.record.schema import parse
from tests.analysis.test_links import moved, record_of

Made = dict[str, Any]

INFINITE, SIXTEEN = float("inf"), 2**24
RING, SUM = "all-gather, reduce-scatter", "all-reduce"
LINKS = [
    LinkEfficiency("nvlink", RING, 2**16, SIXTEEN, 8, 8, 0.5, 0.8, 1.5, 9, 3, ("A100",)),
    LinkEfficiency("nvlink", RING, SIXTEEN, INFINITE, 8, 8, 0.8, 0.9, 1.25, 9, 3, ("A100",)),
    LinkEfficiency("nvlink", SUM, SIXTEEN, INFINITE, 8, 8, 1.0, 0.8, 1.5, 9, 3, ("A100",)),
    LinkEfficiency("network", RING, 2**16, INFINITE, 16, 32, 0.5, 0.5, 2.0, 9, 3, ("H100",)),
]
FIT = Fit({}, 0.1, 1e-5, LINKS)
RATES = {"nvlink": 1e10, "network": 1e11, "pcie": 1e9}
GATHERED = 2 * 10**9
"""The payload of two large calls."""
LONG = Interval(2.0, 1.5, 3.0)
"""The seconds that a phase computes, unless a test says others."""


def row(
    phase: str,
    operation: str,
    link: str | None,
    nbytes: int = GATHERED,
    group: str = "0-7",
    ranks: int = 8,
    wire: int | None = 8 * 10**9,
) -> Made:
    """Two calls among `ranks`."""
    return {**moved(phase, operation, link, nbytes, group, wire), "ranks": ranks}


def of(*rows: Made, computing: Interval | None = LONG, **more: Any) -> Estimate:
    """What a step of these rows waits for; its forward and its backward each compute for so long, its step none."""
    of_phases = {"forward": computing, "backward": computing, "step": Interval(0, 0, 0)}
    phases = [
        Bound(name, None, None, Ceilings(), None, estimate=Estimate(each)) for name, each in of_phases.items()
    ]
    given = {"rates": RATES, "page": "a100-80gb", "fit": FIT, **more}
    return of_step(parse(record_of([*rows]), "it"), phases, **given)


def test_what_may_hide_waits_for_nothing_at_best_and_for_all_of_it_at_worst() -> None:
    gathered = row("forward", "all-gather", "nvlink")  # 8 GB at 10 GB/s x 0.8: 1 s, from 0.9 to 1.25
    assert of(gathered).interval == pytest.approx((0.5, 0.0, 1.25))
    short = Interval(0.4, 0.3, 0.6)  # hides 0.4 of it; at its shortest 0.3 of the least
    assert of(gathered, computing=short).interval == pytest.approx(((1.0 + 0.6) / 2, 0.9 - 0.3, 1.25))


def test_what_operators_wait_for_hides_nothing_and_phases_add_up() -> None:
    updated = row("step", "all-gather", "nvlink")
    assert of(updated).interval == pytest.approx((1.0, 0.9, 1.25))
    summed = row("forward", "all-reduce", "nvlink")  # 0.8 s, from 0.64 to 1.2
    assert of(updated, summed).interval == pytest.approx((1.8, 1.54, 2.45))


def test_a_call_smaller_than_the_rows_takes_as_long_as_the_smallest_with_rows() -> None:
    tiny = row("step", "all-gather", "nvlink", 2000, wire=1750)
    smallest = 2 * 57344 / 1e10 / 0.5  # each of two calls: 7 / 8 of 64 KiB by ring
    assert of(tiny).interval == pytest.approx((smallest, 1750 / 1e10, smallest * 1.5))


def test_on_the_network_a_ring_of_whole_nodes_has_the_rate_of_a_node() -> None:
    across = row("step", "reduce-scatter", "network", group="0-15", ranks=16)
    assert of(across).interval == pytest.approx((0.16, 0.08, 0.32))


def test_a_little_that_has_no_rows_counts_with_the_best_and_the_worst_efficiency() -> None:
    copied = row("forward", "host-to-device", "pcie", 10**6, "", 0, None)  # 1 ms of 4 s
    assert of({**copied, "phase": "step"}).interval == pytest.approx((0.001, 0.001, 0.01))
    assert of().interval == (0, 0, 0)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (row("step", "all-gather", None), "does not say on which nodes its ranks are"),
        (row("step", "host-to-device", "pcie", wire=None), "no rows of host-to-device on pcie"),
        (row("step", "broadcast", "nvlink"), "no rows of broadcast on nvlink"),
        (row("forward", "send", "nvlink", 1, wire=None), "its stages wait for each other"),
        (row("step", "all-gather", "infinity-fabric"), "no page says how fast its infinity-fabric is"),
        (row("step", "all-gather", "nvlink", ranks=4), "in groups of 8 ranks, and none of 4"),
        (row("step", "all-reduce", "nvlink", 10**6), "no rows of all-reduce on nvlink of 500,000 bytes"),
        (row("step", "all-gather", "network", group="0,8", ranks=2), "all ranks of nodes of 8"),
        (
            row("step", "all-gather", "network", group="0-63", ranks=64),
            "in groups of 16 to 32 ranks, and none of 64",
        ),
    ],
)
def test_outside_of_the_rows_there_is_none(sent: Made, said: str) -> None:
    estimate = of(sent)
    assert estimate.interval is None
    assert said in estimate.why


def test_without_a_page_or_a_phase_there_is_none() -> None:
    across = row("step", "all-gather", "network", group="0-15", ranks=16)
    assert "--network NAME gives one" in of(across, rates={}).why
    assert "on this GPU" in of(row("step", "all-gather", "nvlink"), page="b200").why
    assert of(across, computing=None).why == "a phase has none"


def test_traffic_that_nobody_counted_has_none() -> None:
    phases = [Bound("forward", None, None, Ceilings(), None, estimate=Estimate(Interval(1, 1, 1)))]
    estimate = of_step(parse(record_of(None), "it"), phases, RATES, "a100-80gb", FIT)
    assert estimate.interval is None
    assert "what ranks send is not in the record" in estimate.why


def test_the_efficiency_of_a_link_is_the_median_over_runs_and_the_error_that_of_the_others_on_each() -> None:
    def sent(run: str, efficiency: float, operation: str = "all-gather", ranks: int = 8) -> Sent:
        return Sent(run, "nvlink", "A100", operation, 2**20, ranks, efficiency)

    of_ring = [
        sent("a", 0.4),
        sent("a", 0.6, "reduce-scatter"),
        sent("a", 0.6),
        sent("b", 0.8),
        sent("c", 0.5),
    ]
    (found,) = link_fit.fit([*of_ring, sent("a", 0.1, ranks=4), sent("a", 0.2, "all-to-all")])
    assert (found.kind, found.least, found.most, found.fewest, found.largest) == (RING, 2**20, 2**22, 8, 8)
    assert (found.share, found.low, found.high) == pytest.approx((0.6, 0.55 / 0.8, 0.65 / 0.4))
    assert (found.rows, found.runs) == (5, 3)


def test_a_row_has_its_bytes_by_ring_over_its_seconds_or_its_bus_bandwidth(tmp_path: Path) -> None:
    names = "source,path,commit,gpu,page,ranks,per_node,network,operation,bytes,seconds,busbw,note"
    file = tmp_path / "rows.csv"
    file.write_text(
        f"{names}\ns,p,c,g,h100-sxm,8,8,,all-reduce,800000000,0.01,,\ns,p,c,g,h200,16,8,gcp-a3-ultra,all-gather,1,,1e11,\n"
    )
    inside, across = link_fit.rows(file)
    assert (inside.link, inside.chip) == ("nvlink", "H100")
    assert inside.efficiency == pytest.approx(2 * 8e8 * 7 / 8 / 0.01 / 450e9)
    assert (across.link, across.efficiency) == ("network", 0.25)


def test_the_tool_adds_what_ranks_send_or_says_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(record: Made, *options: str) -> str:
        (tmp_path / "record.json").write_text(json.dumps(record))
        assert main(["roofline", str(tmp_path), "--hardware", "h100-sxm", *options]) == 0
        return capsys.readouterr().out

    made = record_of([row("step", "all-gather", "network", group="0-15", ranks=16)])
    for phase in made["ranks"][0]["phases"]:
        phase["work"] = {"elementwise": {"flops": 0, "read": 10**9, "written": 0, "calls": 2}}
    assert "no page says how fast its network is; --network NAME gives one." in said(made)
    assert "are what ranks send each other" in said(made, "--network", "gcp-a3-ultra")
    (found,) = json.loads(said(made, "--network", "gcp-a3-ultra", "--json"))
    *phases, whole = (each["estimate"] for each in found["phases"])
    for limit in ("low", "seconds", "high"):
        parts = [each[limit] for each in [*phases, found["communication"]]]
        assert whole[limit] == pytest.approx(sum(parts))
