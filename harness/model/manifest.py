"""The manifest of an exported checkpoint: the size and digest of each file in it, so that a changed one is noticed.

Other programs ignore it. A checkpoint without one, from elsewhere, is taken as it is.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.config.settings import Refusal
from harness.runtime.files import digest, flush

FILE = "harness_manifest.json"
SCHEMA = "harness.export/1"


def write(directory: Path, patterns: Sequence[str]) -> None:
    """Write the manifest of the files of `patterns` in `directory`, and wait until they are on disk. Raises OSError."""
    files = {}
    for file in sorted({each for pattern in patterns for each in directory.glob(pattern)}):
        flush(file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": digest(file)}
    text = json.dumps({"schema": SCHEMA, "files": files}, indent=1) + "\n"
    (directory / FILE).write_text(text)
    flush(directory / FILE)


def check(place: str, directory: Path, patterns: Sequence[str], key: str = "model.path") -> None:
    """Compare the files of `patterns` in `directory` with its manifest, if it has one.

    Raises Refusal about `place`, the value of `key`, for the first that is not as it was written.
    """
    if not (directory / FILE).exists():
        return
    try:
        files = _read(directory)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _changed(key, place, FILE, "it was changed") from error
    for name, (nbytes, sha256) in files.items():
        file = directory / name
        if not any(file.match(pattern) for pattern in patterns):
            continue
        if not file.is_file():
            raise _changed(key, place, name, "it was removed")
        if file.stat().st_size != nbytes or digest(file) != sha256:
            raise _changed(key, place, name, "it was changed")


def _read(directory: Path) -> dict[str, tuple[int, str]]:
    """The bytes and the digest of each file. Raises ValueError and others for a manifest that no export has written."""
    content: dict[str, Any] = json.loads((directory / FILE).read_text())
    if content["schema"] != SCHEMA or any(Path(name).name != name for name in content["files"]):
        raise ValueError("another schema, or files elsewhere")
    return {name: (each["bytes"], each["sha256"]) for name, each in content["files"].items()}


def _changed(key: str, place: str, name: str, what: str) -> Refusal:
    remedy = f"{name} in it is not what was written: {what}, or the disk lost bytes; give a whole copy, or, where the "
    return Refusal(key, place, f"{remedy}change is meant, delete {FILE} in it")
