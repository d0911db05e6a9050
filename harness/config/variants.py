"""Composes many configs that differ in a few overrides: Hydra composes each override once, and not each config."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from harness.config.compose import compose
from harness.config.load import resolved
from harness.config.settings import Refusal

Tree = dict[str, Any]
Leaves = dict[tuple[str, ...], Any]
"""The values of a tree by their path."""

TOGETHER = ("model", "hardware", "deepspeed", "hydra")
"""Groups of which `compose` drops or adds values by what else is set."""

_GONE = object()
"""The value of a path that an override takes away."""


class Variants:
    """The configs of `overrides` with a few more."""

    def __init__(self, overrides: Sequence[str]) -> None:
        self._overrides = tuple(overrides)
        self._leaves: dict[tuple[str, ...], Leaves | Refusal] = {}
        self._changes: dict[str, Leaves] = {}

    def tree(self, *more: str) -> Tree:
        """The config of `overrides` and then `more`, as plain nested dicts. Raises Refusal as `compose` does."""
        if any(each.startswith("-") for each in self._overrides):  # a config of the user's own
            return _nested(self._composed(more))
        options, keys = _parted(more)
        changed = [self._changed(override) for override in options]
        apart = not any("${" in each for each in (*self._overrides, *more)) and _agree(changed)
        if not apart or any(each.startswith(TOGETHER) for each in more):
            return _nested(self._composed(more))
        leaves = dict(self._composed(()))
        for change in (*changed, *map(self._changed, keys)):  # a key comes after what an option sets
            leaves.update(change)
        return _nested(leaves)

    def _changed(self, override: str) -> Leaves:
        """What `override` changes; a key's own value also where that stays the same."""
        if override not in self._changes:
            self._changes[override] = self._difference(override)
        return self._changes[override]

    def _difference(self, override: str) -> Leaves:
        key, _, value = override.partition("=")
        path, before = tuple(key.split(".")), self._composed(())
        if path in before and value.isdecimal() and str(int(value)) == value:
            return {path: int(value)}
        after = self._composed((override,))
        return {
            each: after.get(each, _GONE)
            for each in {**before, **after}
            if each == path or before.get(each, _GONE) != after.get(each, _GONE)
        }

    def _composed(self, more: tuple[str, ...]) -> Leaves:
        if more not in self._leaves:
            try:
                self._leaves[more] = dict(_leaves(resolved(compose([*self._overrides, *more]))))
            except Refusal as refusal:
                self._leaves[more] = refusal
        composed = self._leaves[more]
        if isinstance(composed, Refusal):
            raise composed
        return composed


def _parted(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options of groups among `overrides`, and the keys."""
    keys = [each for each in overrides if "." in each.partition("=")[0]]
    return [each for each in overrides if each not in keys], keys


def _agree(changed: Sequence[Leaves]) -> bool:
    """Whether no two of them set a value differently."""
    return all(
        one[path] == other[path]
        for one, other in combinations(changed, 2)
        for path in one.keys() & other.keys()
    )


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _nested(leaves: Leaves) -> Tree:
    tree: Tree = {}
    for (*groups, name), value in leaves.items():
        if value is _GONE:
            continue
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return tree
