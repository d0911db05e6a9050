"""What every test runs under: no hub, and few threads, so that tests beside each other do not fight for cores."""

import os

import pytest

for name, value in {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(name, value)

pytest_plugins = ["pytester"]


@pytest.fixture(scope="session")
def quanto() -> None:
    """quanto's own operators, which it compiles where they are first used: once, within no test's timeout."""
    import optimum.quanto.library.extensions.cpp

    assert optimum.quanto.library.extensions.cpp.ext.lib
