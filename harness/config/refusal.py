"""What a wrong request raises, and values as the command line writes them. It imports nothing of ours."""

from collections.abc import Iterable


class Refusal(Exception):
    """A request that cannot be carried out: its key, its value and the remedy. Printed as one line, exit code 2."""

    def __init__(self, key: str, value: object, remedy: str) -> None:
        super().__init__(key, value, remedy)
        self.key, self.value, self.remedy = key, value, remedy

    def __str__(self) -> str:
        flag = self.key.startswith("-") and self.value == ""
        what = self.key if flag else f"{self.key}={_shortened(as_typed(self.value))}"
        return printable(" ".join(f"{what}: {self.remedy}".split()))


def printable(text: str) -> str:
    """`text` without characters that control a terminal: control characters, line ends, changes of direction."""
    return "".join(character if character.isprintable() else "?" for character in text)


LONGEST = 300
"""The most characters of a value in a sentence."""

DEEPEST = 40
"""The most levels of a value that is written out."""


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def as_typed(value: object, levels: int = DEEPEST) -> str:
    """`value` as the command line writes it; what is deeper than `levels` is left out."""
    if isinstance(value, list | dict) and not levels:
        return "..."
    if isinstance(value, list):
        return f"[{','.join(as_typed(each, levels - 1) for each in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{as_typed(each, levels - 1)}' for key, each in value.items())}}}"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def nearest(key: str, keys: Iterable[str]) -> str:
    """The remedy for an unknown `key`: the closest known key, by the whole path or by its last part."""
    import difflib

    keys = list(keys)
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
    last = key.rpartition(".")[2]
    close = close or [each for each in keys if each.rpartition(".")[2] == last]
    close = close or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    return f"no such key; did you mean {close[0]}?" if close else "no such key; --help lists them all"
