"""An inference run as a point of a study: its settings, and what a token costs. It imports no torch."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from harness.analysis.args import Parser, refuse
from harness.analysis.labels import labels
from harness.config.load import typed
from harness.config.settings import NEW_TOKENS, Refusal
from harness.record.record_file import read
from harness.record.results import Ceilings
from harness.record.schema import Record, parse


@dataclass(frozen=True)
class Point:
    """A run of `batch` sequences, each of `prompt` tokens and `new` ones after them; figures are of one replica.

    `flops` and `moved` (bytes) are of the first batch's whole decode, counted from its operators. `step_seconds` is the
    median from one token to the next; `decode_seconds` is the time of a batch's decode. `kv` is in bytes. None: not
    measured. `name` is the run's.
    """

    model: str
    cache: str
    batch: int
    prompt: int
    new: int
    rehearsed: bool
    step_seconds: float | None
    decode_seconds: float | None
    tokens_per_second: float | None
    kv: int | None
    flops: int | None
    moved: int | None
    ceilings: Ceilings
    name: str = ""

    @property
    def context(self) -> int:
        """Tokens of a complete sequence."""
        return self.prompt + self.new

    @property
    def steps(self) -> int:
        """Forwards of a decode. The first new token comes from the prefill."""
        return self.new - 1

    def each(self, figure: float | None) -> float | None:
        """A decode's `figure` divided by its forwards."""
        return None if figure is None or not self.steps else figure / self.steps

    @property
    def intensity(self) -> float | None:
        """FLOPs for each byte that the decode moves."""
        return self.flops / self.moved if self.flops is not None and self.moved else None

    @property
    def balance(self) -> float | None:
        """The machine's FLOPs for each byte that it can move."""
        return self.ceilings.balance

    @property
    def bound(self) -> float | None:
        """The least seconds in which the machine can do the counted work of a decode."""
        if self.flops is None or self.moved is None:
            return None
        return self.ceilings.at_best(self.flops, self.moved)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        fields = {key: value for key, value in asdict(self).items() if key != "ceilings"}
        machine = {"bandwidth": self.ceilings.bandwidth, "peak_flops": self.ceilings.flops}
        derived = {"intensity": self.intensity, "balance": self.balance, "bound_seconds": self.bound}
        return {**fields, **machine, **derived}


def point(record: Record, source: str) -> Point:
    """`record` as a point. Raises ValueError with a sentence for a run that cannot be one."""
    if record.mode != "infer":
        raise ValueError(f"{source} is a run of mode={record.mode}, and this tool reads runs that generate")
    try:
        settings = typed(record.config)
    except Refusal as refusal:
        raise ValueError(f"{source} has a config that cannot be read: {refusal}") from None
    generation = settings.generation
    if generation.prompts or generation.prompt or generation.workload or generation.lengths != "fixed":
        raise ValueError(
            f"{source} has prompts of its own; this tool needs runs with generation.prompt_length= alone"
        )
    phases = record.ranks[0].phases if record.ranks else []
    decode = [phase for phase in phases if phase.phase == "decode" and phase.step == 0]
    flops = [phase.flops for phase in decode if phase.flops is not None]
    moved = [phase.moved for phase in decode if phase.moved is not None]
    counted = len(flops) == len(moved) == len(decode) > 0
    rate, between = (
        record.performance.decode_tokens_per_second,
        record.performance.latency.between_tokens_seconds,
    )
    new = record.inference.max_new_tokens or generation.max_new_tokens or NEW_TOKENS
    dp_size = settings.layout(record.world.size).dp_size
    if not dp_size:
        raise ValueError(f"{source} has fewer ranks than its stages and its generation.tensor_parallel need")
    return Point(
        record.model.short,
        generation.cache,
        generation.batch,
        generation.prompt_length,
        new,
        record.world.rehearsed,
        between.p50 if between else None,
        generation.batch * dp_size * (new - 1) / rate if rate else None,
        rate / dp_size if rate else None,
        record.inference.kv_reserved,
        sum(flops) if counted else None,
        sum(moved) if counted else None,
        record.limits,
    )


def main_of(
    argv: Sequence[str],
    tool: str,
    description: str,
    epilog: str,
    say: Callable[[Sequence[Point], bool], str],
) -> int:
    """Run the command line of a tool that shows points; returns the exit code."""
    parser = Parser(
        tool, description, f"{epilog} Exit code 2: a run has no record that can be read, or is no point."
    )
    parser.takes_runs("*")
    parser.add_argument("--json", action="store_true", help="the same as JSON; null: not measured")
    try:
        options = parser.parse_args(argv)
        if len(options.run) < 2:
            raise ValueError(f"{tool}: there is nothing to compare; name two runs or more")
        records = [parse(read(path), str(path)) for path in options.run]
        names = [label.text for label in labels(options.run, records)]
        points = [
            replace(point(record, str(path)), name=name)
            for record, path, name in zip(records, options.run, names, strict=True)
        ]
        print(say(points, options.json))
    except ValueError as error:
        return refuse(error)
    return 0
