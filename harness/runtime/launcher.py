"""Reports a failure to torchrun, whose own report is printed after the output of all ranks."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path


def report(sentence: str) -> None:
    """Write `sentence` as this rank's error for torchrun's report. Without torchrun this does nothing."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        # torchrun reports the rank with the earliest timestamp last, as the cause
        extra_info = {"timestamp": str(int(time.time()))}
        contents = {"message": {"message": f"harness: {sentence}", "extraInfo": extra_info}}
        with suppress(OSError):
            Path(file).write_text(json.dumps(contents))
