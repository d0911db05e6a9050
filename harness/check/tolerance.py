"""How far a category may be from its baseline: nothing where nothing is said."""

from collections.abc import Mapping
from typing import NamedTuple

from harness.ledger.categories import CATEGORIES
from harness.tables import parse_size

TOLERATED = (*CATEGORIES, "kernel", "allocator", "unattributed")
"""Every figure that may have a tolerance; the last three are the allocator's, where both sides have them."""


class Tolerance(NamedTuple):
    """A share of the baseline's figure, or bytes: so far from it is as good as on it."""

    share: float = 0.0
    bytes: int = 0

    def allows(self, before: int, after: int) -> bool:
        """Whether `after` is near enough to the baseline's `before`."""
        return abs(after - before) <= max(self.bytes, self.share * abs(before))


NONE = Tolerance()


def tolerances(texts: Mapping[str, str], said: str) -> dict[str, Tolerance]:
    """`{"activations": "1%"}` as tolerances. Raises ValueError, a sentence that begins with `said`."""
    found = {}
    for name, text in texts.items():
        if name not in TOLERATED:
            raise ValueError(f"{said}{name}={text}: no such category; one of {', '.join(TOLERATED)}")
        try:
            found[name] = _tolerance(text)
        except ValueError:
            remedy = "should be a share as 1%, or a size as 64KiB, 0 or more"
            raise ValueError(f"{said}{name}={text}: {remedy}") from None
    return found


def _tolerance(text: str) -> Tolerance:
    if not text.endswith("%"):
        return Tolerance(bytes=parse_size(text))
    share = float(text.removesuffix("%")) / 100
    if not 0 <= share < float("inf"):
        raise ValueError(text)
    return Tolerance(share=share)
