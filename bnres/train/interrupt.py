"""Lets a run end between two batches when it is asked to stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether a signal has asked the run to stop."""

    asked = False


class Stopped(Exception):
    """The run has stopped because it was asked to, its checkpoint written."""


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Inside, Ctrl-C and SIGTERM set ``asked``; a second one interrupts at once.

    Only the main thread can handle signals; in another nothing changes.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
