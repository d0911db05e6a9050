"""How each category is drawn: colours that differ in lightness too, each with a pattern, for print and for any eye."""

from typing import NamedTuple


class Look(NamedTuple):
    """A colour, and the sign of a pattern over it as Plotly spells it; empty: none."""

    colour: str
    pattern: str


LOOKS = {
    "parameters": Look("#0072b2", ""),
    "gathered": Look("#56b4e9", "/"),
    "gradients": Look("#d55e00", "\\"),
    "optimizer": Look("#009e73", "x"),
    "activations": Look("#e69f00", ""),
    "kv_cache": Look("#cc79a7", "-"),
    "communication": Look("#7a68c9", "|"),
    "inputs": Look("#8c8c8c", "+"),
    "workspace": Look("#b5b04a", "."),
    "kernel": Look("#666666", "x"),
}
"""By category, in the order in which they are stacked. The colours are those of Okabe and Ito (2008) and greys."""

LINKS = {
    "storage": Look("#8c8c8c", "+"),
    "host-memory": Look("#b5b04a", "-"),
    "pcie": Look("#e69f00", "/"),
    "nvlink": Look("#009e73", ""),
    "infinity-fabric": Look("#56b4e9", "|"),
    "network": Look("#d55e00", "x"),
}
"""By link, from a rank outward."""

OTHER = Look("#999999", ".")
"""A category or a link that this version does not know."""
