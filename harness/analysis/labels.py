"""Names runs by what they are: the mode, the model, and the settings in which runs of one mode and model differ."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.record.fields import flat, printable
from harness.record.record_file import FILE
from harness.record.schema import Record
from harness.tables import tail

SHOWN = 4
"""The most settings in a label."""

LONGEST = 40
"""The most characters of a model's name, of a key, and of a value."""

GROUPS = {
    "zero.stage": "zero",
    "checkpointing.mode": "checkpointing",
    "loss.kind": "loss",
    "optimizer.kind": "optimizer",
    "adapter.kind": "adapter",
    "data.kind": "data",
    "ledger.mode": "ledger",
    "world.kind": "world",
    "hardware.name": "hardware",
    "network.name": "network",
}
"""The key that an option of a group sets, and the group's name, with which the option is typed."""

PAGES = ("hardware", "network")
"""Groups whose pages set all keys below them; a page's name stands for them."""

UNSAID = ("train.", "generation.", "model.config.")
"""Prefixes of keys that their last part tells well enough."""

OTHER_MODE = {"train": ("generation.",), "infer": ("train.", "zero", "checkpointing", "loss", "optimizer")}
"""By mode, the beginnings of keys that have no effect in it."""

WATCHING = ("ledger.trace", "ledger.snapshot", "world.timeout")
"""Keys that change nothing of what a run computes."""

Values = Mapping[str, Any]
"""A run's settings by key, as the key is typed."""


class Label(NamedTuple):
    """A run's name in two parts: mode and model, then `key=value` for each setting in which similar runs differ.

    Where no setting differs, the directory is the second part.
    """

    title: str
    settings: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The whole name, in one line."""
        return " ".join((self.title, *self.settings))


def labels(paths: Sequence[Path], records: Sequence[Record]) -> list[Label]:
    """A label for each run, all different."""
    settings = [settings_of(record) for record in records]
    named: list[Label] = [Label("")] * len(records)
    for group in similar(records):
        keys = telling([settings[index] for index in group])
        for index in group:
            title = f"{records[index].mode} {tail(records[index].model.short, LONGEST)}"
            named[index] = Label(title, tuple(written(key, settings[index].get(key)) for key in keys))
    places = [path.parent if path.name == FILE else path for path in paths]
    for part in (
        [Path(os.path.abspath(place)).name for place in places],
        [str(place) for place in places],
        [f"#{number}" for number in range(1, len(places) + 1)],
    ):
        named = _apart(named, part)
    return named


def similar(records: Sequence[Record]) -> list[list[int]]:
    """The indices of the records, together those of one mode and model."""
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(record.title, []).append(index)
    return list(groups.values())


def _apart(named: Sequence[Label], parts: Sequence[str]) -> list[Label]:
    """The labels; those that equal another get their part of `parts`, where these differ."""
    times = Counter(label.text for label in named)
    apart = list(named)
    for text in (text for text, count in times.items() if count > 1):
        group = [index for index, label in enumerate(named) if label.text == text]
        if len({parts[index] for index in group}) == len(group):
            for index in group:
                apart[index] = named[index]._replace(
                    settings=(*named[index].settings, f"({printable(parts[index])})")
                )
    return apart


def settings_of(record: Record) -> dict[str, Any]:
    """What the run's own mode reads of its config, by key as it is typed, in the config's order.

    The size of the world is as it was. Its nodes are a setting only where they were asked for.
    """
    left_out = {"mode", "model.name", *WATCHING}
    if record.world.size == 1 or not record.world.rehearsed or "world.per_node" in record.resolved:
        left_out.add("world.per_node")
    values = {
        GROUPS.get(key, key): value
        for key, value in flat(record.config)
        if key not in left_out and not key.startswith(OTHER_MODE.get(record.mode, ()))
    }
    return values | {"world": record.world.kind, "world.size": record.world.size}


def differing(runs: Sequence[Values]) -> list[str]:
    """The keys in which the runs differ, in the config's order. A page differs in its name alone."""
    keys = dict.fromkeys(key for run in runs for key in run)
    found = [key for key in keys if len({text_of(run.get(key)) for run in runs}) > 1]
    named = tuple(f"{page}." for page in PAGES if page in found)
    return [key for key in found if not key.startswith(named)]


def telling(runs: Sequence[Values]) -> list[str]:
    """At most `SHOWN` of the keys in which the runs differ: those that separate the most runs, in config order."""
    found, chosen = differing(runs), list[str]()
    while len(chosen) < min(SHOWN, len(found)):
        rest = [key for key in found if key not in chosen]
        chosen.append(max(rest, key=lambda key: len({_values(run, [*chosen, key]) for run in runs})))
    return [key for key in found if key in chosen]


def _values(run: Values, keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(text_of(run.get(key)) for key in keys)


def text_of(value: Any) -> str:
    """A value as it is typed, in printable characters."""
    return printable(value if isinstance(value, str) else json.dumps(value))


def short(key: str) -> str:
    """`key` without a prefix that goes without saying in its mode: `micro_batch` for `train.micro_batch`."""
    prefix = next((prefix for prefix in UNSAID if key.startswith(prefix)), "")
    return tail(printable(key.removeprefix(prefix)), LONGEST)


def written(key: str, value: Any) -> str:
    """`key=value`, both short; of a long value the end."""
    return f"{short(key)}={tail(text_of(value), LONGEST)}"
