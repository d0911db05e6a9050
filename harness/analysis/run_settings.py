"""The settings of a run that has left a record."""

from typing import TYPE_CHECKING

from harness.config.refusal import Refusal
from harness.record.schema import Record

if TYPE_CHECKING:
    from harness.config.settings import Settings


def settings_in(record: Record) -> "Settings | None":
    """The run's config; None where it has none, or one that this version cannot read."""
    from harness.config.load import typed  # not imported where no config is read

    try:
        return typed(record.config) if record.config else None
    except Refusal:
        return None
