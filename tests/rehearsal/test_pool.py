"""What goes wrong in a worker arrives in the process that started it, and its traceback is in a file."""

import pickle
import re
from pathlib import Path

import pytest

from harness.config.compose import compose
from harness.config.load import Refusal, load
from harness.ledger import Where
from harness.rehearsal import pool
from harness.runtime import faults

TINY = ("mode=infer", "model=tiny", "model.config.num_hidden_layers=1", "world=rehearsed", "world.size=1")


class Picky(Exception):
    """An error that another process cannot receive: it takes two arguments, and says one."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} {where}")


def fail() -> None:
    """Fail as a rehearsal of rank 3 does."""
    error = Picky("out of luck", "somewhere")
    vars(error)["rehearsed"] = 3, Where(1, "forward", 0)
    raise error


def traceback_in(said: str) -> str:
    """The text of the file that `said` names, which is then removed."""
    named = re.search(r" \(traceback in (.+)\)$", said)
    assert named is not None, said
    file = Path(named[1])
    text = file.read_text()
    file.unlink()
    return text


def test_an_error_that_cannot_cross_processes_arrives_with_its_rank_place_and_traceback() -> None:
    with pytest.raises(RuntimeError) as raised:
        pool.portable(fail)
    arrived = pickle.loads(pickle.dumps(raised.value))
    assert str(arrived).startswith("Picky: out of luck somewhere (traceback in ")
    assert arrived.rehearsed == (3, Where(1, "forward", 0))
    assert "in fail" in traceback_in(str(arrived))


def test_an_error_that_can_cross_is_itself() -> None:
    refusal = Refusal("zero", 7, "no such stage")

    def refuse() -> None:
        raise refusal

    with pytest.raises(Refusal) as raised:
        pool.portable(refuse)
    assert raised.value is refusal


def test_a_rehearsal_s_own_error_names_the_file_and_a_refusal_needs_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unlucky(point: str, number: int) -> None:
        raise KeyError(f"out of luck at {point}")

    monkeypatch.setattr(faults, "inject", unlucky)
    failure = pool.worst(load(compose(TINY))).failure
    assert failure.startswith("KeyError: 'out of luck at prefill' (traceback in ")
    assert "faults.at" in traceback_in(failure)
    refused = pool.worst(load(compose([*TINY, "model.config.model_type=bert"]))).failure
    assert refused.startswith(pool.REFUSED)
    assert "traceback" not in refused
