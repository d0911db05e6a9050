"""How far a category may be from its baseline; the default is zero."""

from collections.abc import Mapping
from typing import NamedTuple

from harness.ledger.categories import CATEGORIES
from harness.tables import parse_size

TRAFFIC = "traffic"
TOLERATED = (*CATEGORIES, "kernel", "allocator", "unattributed", "reserved", TRAFFIC)
"""Every figure that may have a tolerance. Those of the allocator and of traffic are compared where both sides have
them.
"""


class Tolerance(NamedTuple):
    """The allowed distance from the baseline's figure: a share of that figure, or bytes; the larger counts."""

    share: float = 0.0
    bytes: int = 0

    def allows(self, before: int, after: int) -> bool:
        """Whether `after` is within the tolerance of the baseline's `before`."""
        return abs(after - before) <= max(self.bytes, self.share * abs(before))


NONE = Tolerance()


def tolerances(texts: Mapping[str, str], prefix: str) -> dict[str, Tolerance]:
    """Texts such as `{"activations": "1%"}` as tolerances. Raises ValueError, a sentence that begins with `prefix`."""
    by_name = {}
    for name, text in texts.items():
        if name not in TOLERATED:
            raise ValueError(f"{prefix}{name}={text}: no such category; one of {', '.join(TOLERATED)}")
        try:
            by_name[name] = _tolerance(text)
        except ValueError:
            remedy = "should be a share as 1%, or a size as 64KiB, 0 or more"
            raise ValueError(f"{prefix}{name}={text}: {remedy}") from None
    return by_name


def _tolerance(text: str) -> Tolerance:
    if not text.endswith("%"):
        return Tolerance(bytes=parse_size(text))
    share = float(text.removesuffix("%")) / 100
    if not 0 <= share < float("inf"):
        raise ValueError(text)
    return Tolerance(share=share)
