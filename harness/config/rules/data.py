"""The rules of where tokens come from, and how they become sequences."""

from harness.config.rules.sources import files
from harness.config.settings import Refusal, Settings


def check(settings: Settings) -> None:
    """Refuse keys that the kind of data does not read, and kinds that the mode does not."""
    data = settings.data
    if data.kind in ("text", "chat"):
        if data.path is None:
            remedy = f"data={data.kind} needs data.path=, a file, a directory or a quoted glob"
            raise Refusal("data.path", None, remedy)
        files("data.path", data.path)
    elif data.path is not None:
        raise Refusal("data.path", data.path, f"data={data.kind} reads no path; use data=text or data=chat")
    if data.kind == "hub" and data.name is None:
        raise Refusal("data.name", None, "data=hub needs data.name=, the dataset's name")
    if data.kind != "hub" and data.name is not None:
        raise Refusal("data.name", data.name, f"data={data.kind} takes no name; use data=hub")
    if data.kind != "hub" and data.streaming:
        raise Refusal("data.streaming", True, f"data={data.kind} is memory-mapped; only data=hub streams")
    if settings.mode == "infer":
        _of_generation(settings)


def _of_generation(settings: Settings) -> None:
    if settings.data.kind == "chat":
        remedy = "generation continues text, and conversations are for training; give generation.prompts= or data=text"
        raise Refusal("data", "chat", remedy)
    if not settings.data.packing:
        remedy = "mode=infer cuts its prompts from a row of text, and pads no document; leave it out"
        raise Refusal("data.packing", False, remedy)
