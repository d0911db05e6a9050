"""What torchrun is told: its report, which comes after all that ranks print, ends with a sentence of theirs."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path


def tell(sentence: str) -> None:
    """Let torchrun's report have `sentence` as what became of this rank; without torchrun nobody asks."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        when = {"timestamp": str(int(time.time()))}  # of several ranks the first is told last, as the cause
        told = {"message": {"message": f"harness: {sentence}", "extraInfo": when}}
        with suppress(OSError):
            Path(file).write_text(json.dumps(told))
