"""Stops a run between two batches when a signal arrives."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """``asked`` becomes True when a signal asks the run to stop."""

    asked = False


class Stopped(Exception):
    """Raised when a signal has stopped a run and the run has written its checkpoint."""


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Yields a `Stop`, and catches the first Ctrl-C or SIGTERM inside the context.

    The first signal only sets ``asked`` of the `Stop` to True. A second signal raises
    KeyboardInterrupt. Outside the main thread the context has no effect, because Python handles
    signals only in the main thread.
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
