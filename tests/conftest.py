"""What every test runs under: no hub, and few threads, so that tests beside each other do not fight for cores."""

import os

for name, value in {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(name, value)

pytest_plugins = ["pytester"]
