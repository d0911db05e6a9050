"""Work that is done elsewhere than in the ledger's thread: it is not seen, and this says so."""

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from harness.ledger.log import Log, another_thread
from harness.ledger.replaced import replaced
from harness.ledger.unseen import Unseen

_OPEN: "weakref.WeakSet[Log]" = weakref.WeakSet()


class _Elsewhere(TorchDispatchMode):
    """In a thread that the program starts: the first operator there is worth a word."""

    supports_higher_order_operators = True

    def __init__(self, unseen: Unseen) -> None:
        super().__init__()
        self._unseen: Unseen | None = unseen

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._unseen is not None:
            self._unseen.note(*another_thread())
            self._unseen = None
        return func(*args, **kwargs) if kwargs else func(*args)


@contextmanager
def watching_threads(log: Log) -> Iterator[None]:
    """Say of threads that are started within it, and of forked children, that nobody sees what they do."""
    start = threading.Thread.start

    def started(thread: threading.Thread) -> None:
        if log.here():
            run, own = thread.run, vars(thread).get("run")

            def within() -> None:
                vars(thread).pop("run", None)
                if own is not None:
                    thread.run = own  # type: ignore[method-assign]
                if not log.recording:
                    return run()
                with _Elsewhere(log.unseen):
                    return run()

            thread.run = within  # type: ignore[method-assign]
        start(thread)

    _OPEN.add(log)
    try:
        with replaced(threading.Thread, "start", started):
            yield
    finally:
        _OPEN.discard(log)


def _sleep() -> None:
    for log in _OPEN:
        log.sleep()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_sleep)
