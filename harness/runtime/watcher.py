"""A thread that notices what a rank's main thread cannot while it waits in a collective: signals, torchrun's end."""

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from harness.runtime import launcher

PERIOD = 0.25
"""Seconds between two looks at what sends no signal."""

ALONE = (signal.SIGTERM,)
UNDER_TORCHRUN = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""The signals that end a run. torchrun passes on to its ranks those that it gets."""


class Watcher:
    """What is called, in the watcher's thread, when something is noticed. The run sets it as it gets to know more.

    What is noticed before there is something to call waits for it: imports take seconds.
    """

    def __init__(self) -> None:
        self.on_signal: Callable[[str], object] | None = None  # with the signal's name
        self.on_launcher_gone: Callable[[], object] | None = None
        self.now_and_then: Callable[[], object] = lambda: None


@contextmanager
def watching() -> Iterator[Watcher]:
    """Watch in this context. Signals are as before at its end."""
    watcher, parent = Watcher(), launcher.process()
    if threading.current_thread() is not threading.main_thread():
        yield watcher  # only the main thread may handle signals
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    wakeup_before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    _pipes.add(write_end)
    signals = ALONE if parent is None else UNDER_TORCHRUN
    # the main thread may never run a Python handler; the pipe is enough
    handlers = {each: signal.signal(each, _leave_to_the_thread) for each in signals}
    thread = threading.Thread(
        target=_watch, args=(watcher, read_end, {*signals}, parent), name="watcher", daemon=True
    )
    thread.start()
    try:
        yield watcher
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup_before)
        os.write(write_end, b"\0")
        thread.join()
        _pipes.discard(write_end)
        os.close(read_end)
        os.close(write_end)


_pipes: set[int] = set()
"""The ends of pipes into which this process's signals are written."""


def _forget() -> None:
    """In a fork of this process, which has no watcher: its signals are not this process's."""
    if not _pipes:
        return
    before = signal.set_wakeup_fd(-1)
    if before not in _pipes:
        signal.set_wakeup_fd(before)
    for each in UNDER_TORCHRUN:
        if signal.getsignal(each) is _leave_to_the_thread:
            signal.signal(each, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)


def _leave_to_the_thread(number: int, frame: FrameType | None) -> None:
    pass


def _watch(watcher: Watcher, read_end: int, signals: set[int], parent: int | None) -> None:
    """Look until a zero comes through the pipe."""
    names: list[str] = []
    while True:
        ready, _, _ = select.select([read_end], [], [], PERIOD)
        numbers = os.read(read_end, 64) if ready else b""
        if 0 in numbers:
            return
        names += [signal.Signals(number).name for number in numbers if number in signals]
        while names and watcher.on_signal is not None:
            watcher.on_signal(names.pop(0))
        if parent is not None and os.getppid() != parent and watcher.on_launcher_gone is not None:
            watcher.on_launcher_gone()
            parent = None
        with suppress(Exception):  # what is done now and then is a help to others, and ends no run
            watcher.now_and_then()
