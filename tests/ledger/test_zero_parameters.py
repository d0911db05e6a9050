"""Names for what ZeRO-3 gathers, from what its engine keeps of its parameters."""

from enum import Enum
from types import SimpleNamespace
from typing import Any

from harness.ledger.zero_parameters import ZeroParameters, outwards


class Status(Enum):
    """DeepSpeed's `ZeroParamStatus`."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class Parameter:
    """A parameter with so many elements on each rank, which counts how often it is looked at."""

    looked_at = 0

    def __init__(self, elements: int) -> None:
        self.status = Status.NOT_AVAILABLE
        self.ds_tensor = SimpleNamespace(ds_numel=elements)

    @property
    def ds_status(self) -> Status:
        Parameter.looked_at += 1
        return self.status


class Engine:
    """An engine in place of DeepSpeed's, whose parameters have so many elements on each rank."""

    def __init__(self, *elements: int) -> None:
        self.parameters = [*map(Parameter, elements)]
        self.param_names: dict[Any, str] = {each: f"p{place}" for place, each in enumerate(self.parameters)}
        self.shares = ZeroParameters(self).shares

    def gather(self, *places: int) -> list[str]:
        """The names of what is gathered on 2 ranks in one transfer."""
        self.begin(*places)
        return self.send(*places)

    def begin(self, *places: int) -> None:
        """These are to be gathered."""
        for place in places:
            self.parameters[place].status = Status.INFLIGHT

    def send(self, *places: int) -> list[str]:
        """The names of what is gathered on 2 ranks in one transfer that has these."""
        return [
            *self.shares(
                "all-gather", 2 * sum(self.parameters[place].ds_tensor.ds_numel for place in places), 2
            )
        ]

    def wait(self, *places: int) -> None:
        """These have arrived, and are let go."""
        for place in places:
            self.parameters[place].status = Status.NOT_AVAILABLE


def test_what_is_gathered_in_one_transfer_has_its_names_in_the_models_order() -> None:
    engine = Engine(*[10] * 8)
    assert engine.gather(4, 2, 3) == ["p2", "p3", "p4"]
    assert engine.gather(7) == ["p7"]
    engine.wait(2, 3, 4)
    assert engine.gather(0, 1) == ["p0", "p1"]


def test_what_is_gathered_again_with_nothing_in_between_has_its_name_again() -> None:
    engine = Engine(10, 10, 10)
    for _ in range(3):
        assert engine.gather(1) == ["p1"]
        engine.wait(1)


def test_what_is_gathered_one_by_one_has_its_name_forward_and_backward() -> None:
    """DeepSpeed's allgather_sequential: several are in flight, and each has a transfer of its own."""
    engine = Engine(*range(1, 9))
    for layer in (0, 2, 4, 6, 6, 4, 2, 0):
        engine.begin(layer, layer + 1)
        assert [engine.send(layer), engine.send(layer + 1)] == [[f"p{layer}"], [f"p{layer + 1}"]]
        engine.wait(layer, layer + 1)


def test_what_is_no_parameter_has_no_name_also_while_parameters_are_in_flight() -> None:
    engine = Engine(10, 10, 10)
    assert engine.shares("all-gather", 8, 2) == {}
    assert engine.gather(0, 1) == ["p0", "p1"]
    assert engine.shares("all-gather", 8, 2) == {}
    assert engine.shares("broadcast", 20, 2) == {}


def test_a_deep_model_is_not_looked_through_at_each_transfer() -> None:
    """Forward and then backward, as ZeRO-3 gathers."""
    looks = []
    for number in (100, 200):
        engine = Engine(*[10] * number)
        Parameter.looked_at = 0
        for place in (*range(number), *reversed(range(number))):
            assert engine.gather(place) == [f"p{place}"]
            engine.wait(place)
        looks.append(Parameter.looked_at)
    assert looks[1] <= 2 * looks[0] + 10


def test_outwards_has_each_number_once_the_nearest_first() -> None:
    assert [*outwards(2, 6)] == [2, 3, 1, 4, 0, 5]
    assert [*outwards(0, 3)] == [0, 1, 2]
    assert [*outwards(0, 0)] == []
