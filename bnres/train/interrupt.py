"""Lets a signal stop a run between two batches."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Holds whether a signal has asked the run to stop."""

    asked = False


class Stopped(Exception):
    """Raised when a run stops because a signal asked it to, after its checkpoint is written."""


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Inside, the first Ctrl-C or SIGTERM sets ``asked``; a second one interrupts at once.

    Has no effect outside the main thread, because only the main thread can handle signals.
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
