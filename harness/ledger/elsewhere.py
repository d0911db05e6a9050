"""Work outside the ledger's thread is not seen. This module reports that it happens."""

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from harness.ledger.log import Log, another_thread
from harness.ledger.patch import patched
from harness.ledger.patch_table import PATCHES
from harness.ledger.unseen import Unseen

_OPEN_LOGS: "weakref.WeakSet[Log]" = weakref.WeakSet()


class _Elsewhere(TorchDispatchMode):
    """A mode in a thread that the program starts: its first operator is reported as a gap."""

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
    """Report threads that are started inside this context."""

    def observing(start: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
        def start_observed(self: threading.Thread) -> None:
            if log.here():
                _observe(self, log)
            start(self)

        return start_observed

    with patched(PATCHES["threading.Thread.start"].by(observing)):
        yield


def _observe(thread: threading.Thread, log: Log) -> None:
    """Report to `log` the first operator of `thread`, which is about to start."""
    run, own_run = thread.run, vars(thread).get("run")

    def run_observed() -> None:
        vars(thread).pop("run", None)
        if own_run is not None:
            thread.run = own_run  # type: ignore[method-assign]
        if not log.recording:
            return run()
        with _Elsewhere(log.unseen):
            return run()

    thread.run = run_observed  # type: ignore[method-assign]


@contextmanager
def watching_forks(log: Log) -> Iterator[None]:
    """Stop the log in a child that is forked inside this context."""
    _OPEN_LOGS.add(log)
    try:
        yield
    finally:
        _OPEN_LOGS.discard(log)


def _stop_logs() -> None:
    for log in _OPEN_LOGS:
        log.sleep()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_stop_logs)
