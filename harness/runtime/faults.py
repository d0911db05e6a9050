"""The points of a run at which tests let something fail: a rank dies, hangs, raises, or finds the disk full.

Only a test's own script can set `inject`; no setting, argument or variable of the environment does.
"""

from collections.abc import Callable

inject: Callable[[str, int], None] | None = None
"""Called at each point with its name and its number: the step, or the bytes that are to be written."""


def at(point: str, number: int = 0) -> None:
    """Pass a point: `connect`, `directory`, `start`; `forward`, `backward`, `step`; `prefill`, `decode`; `export`.

    `meet`: a rank that ends is to say so in torchrun's directory. Before a file is written it is `write NAME`, with
    the bytes; before a checkpoint's `write state` and `write manifest.json`, with the step. After a rename it is
    `renamed NAME`.
    """
    if inject is not None:
        inject(point, number)
