"""What several files of this room read: the records of a few runs, rehearsed once."""

from pathlib import Path

import pytest

from tests import hostile


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return hostile.rehearse(tmp_path_factory.mktemp("hostile"))
