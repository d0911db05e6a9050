"""The settings of a run that has left a record."""

from harness.config.load import typed
from harness.config.settings import Refusal, Settings
from harness.record.schema import Record


def settings_in(record: Record) -> Settings | None:
    """The run's config; None where it has none, or one that this version cannot read."""
    try:
        return typed(record.config) if record.config else None
    except Refusal:
        return None
