"""The timing core: a clock that advances by the time of what is timed, and by nothing else.

pytest-benchmark reads it as its ``timer``, `benchmarks.measure` reads it by itself. On a GPU it is
the device's own time, with the L2 cache cold; making it cold, queueing and waiting are outside.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]

# Shorter ones are replayed from a CUDA graph, as the time between two events is no shorter than
# some microseconds, and the host's gaps count among them.
GRAPH_BELOW = 100e-6
# What a replay touches has to be this many times the L2 cache, so that it serves nobody twice.
COLD_FACTOR = 3
WARMUP_CALLS = 3
HOST_CALLS = 10
# A sleeping kernel is given this many cycles a second; clocks are lower than this, so it is longer.
SLEEP_CYCLES = 2e9


class DeviceClock:
    """Seconds that stand still unless something is timed; the type of pytest-benchmark's timer."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@dataclass(frozen=True)
class Timed:
    """Something ready to be timed.

    Attributes:
        round: does it once, and advances the clock by the seconds of one call.
        method: ``events``, ``graph`` (CUDA graph) or ``wall`` (on the CPU).
        host_seconds: time until a call returns, its work perhaps still queued.
    """

    round: Call
    method: str
    host_seconds: float


def touched_copies(touched_bytes: int, l2_bytes: int, most: int = 64) -> int:
    """Independent calls that a graph needs for its memory to be cold."""
    return min(max(-(-COLD_FACTOR * l2_bytes // max(touched_bytes, 1)), 1), most)


def prepare(
    clock: DeviceClock,
    make_call: Callable[[], Call],
    device: torch.device,
    *,
    touched_bytes: int = 0,
    launch: str = "auto",
) -> Timed:
    """Warms a call up and makes it ready to be timed.

    Args:
        clock: what advances.
        make_call: makes a call with tensors of its own; several are needed in a graph.
        device: where it works.
        touched_bytes: memory that a call touches.
        launch: ``auto`` (by the call's length, with the queue kept full, so that the host does
            not count), ``graph`` or ``eager`` (as a user's loop launches it, host included; what
            it touches is left in the cache).
    """
    if device.type != "cuda":
        return _on_cpu(clock, make_call())
    with torch.cuda.device(device):
        return _on_gpu(clock, make_call, touched_bytes, launch)


def durations(clock: DeviceClock, timed: Timed, rounds: int) -> list[float]:
    """Seconds of each round."""
    found = []
    for _ in range(rounds):
        start = clock()
        timed.round()
        found.append(clock() - start)
    return found


def rounds_for(seconds: float, budget: float, least: int = 5, most: int = 100) -> int:
    """Rounds that fit into ``budget`` seconds."""
    return int(min(max(budget / max(seconds, 1e-9), least), most))


def _on_cpu(clock: DeviceClock, call: Call) -> Timed:
    call()
    start = time.perf_counter()
    call()
    host_seconds = time.perf_counter() - start

    def once() -> None:
        start = time.perf_counter()
        call()
        clock.seconds += time.perf_counter() - start

    return Timed(once, "wall", host_seconds)


def _on_gpu(
    clock: DeviceClock, make_call: Callable[[], Call], touched_bytes: int, launch: str
) -> Timed:
    # Backward runs on its forward's stream, and a capture wants one of its own: all run on it.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    flush = cache_flush()
    with torch.cuda.stream(stream):
        call = make_call()
        for _ in range(WARMUP_CALLS):
            call()
        stream.synchronize()
        host_seconds = _host_seconds(call, stream)
        by_events = _event_round(clock, call, stream, flush, host_seconds)
        if launch == "eager":
            return Timed(_event_round(clock, call, stream, None, 0.0), "events", host_seconds)
        if launch == "auto":
            scratch = DeviceClock()
            seconds = min(
                durations(scratch, Timed(_event_round(scratch, call, stream, flush, host_seconds), "", 0.0), 3)
            )  # fmt: skip
            if seconds >= GRAPH_BELOW:
                return Timed(by_events, "events", host_seconds)
        l2 = torch.cuda.get_device_properties(stream.device).L2_cache_size
        count = touched_copies(touched_bytes, l2) if launch == "auto" else 1
        calls = [call, *(make_call() for _ in range(count - 1))]
        for each in calls[1:]:
            each()
        return Timed(_graph_round(clock, calls, stream, flush), "graph", host_seconds)


def cache_flush() -> Call:
    """Writes over the whole L2 cache."""
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    scratch = torch.empty(4 * size, dtype=torch.int8, device="cuda")
    return scratch.zero_


def _host_seconds(call: Call, stream: torch.cuda.Stream) -> float:
    found = []
    for _ in range(HOST_CALLS):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
        stream.synchronize()
    return sorted(found)[len(found) // 2]


def _event_round(
    clock: DeviceClock,
    call: Call,
    stream: torch.cuda.Stream,
    flush: Call | None,
    host_seconds: float,
) -> Call:
    """A round between two events; the device sleeps until the host has queued all of it."""

    def once() -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            if flush is not None:
                flush()
            if host_seconds:
                torch.cuda._sleep(int(2 * host_seconds * SLEEP_CYCLES))
            start.record()
            call()
            end.record()
        end.synchronize()
        clock.seconds += start.elapsed_time(end) / 1e3

    return once


def _graph_round(
    clock: DeviceClock, calls: Sequence[Call], stream: torch.cuda.Stream, flush: Call
) -> Call:
    """A round that replays all calls, each with tensors of its own, from one CUDA graph."""
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    kept: list[Any] = []
    with torch.cuda.graph(graph, stream=stream):
        # Kept until all are captured, or the next call would be given the same memory.
        kept.extend(call() for call in calls)
    replay = _event_round(clock, graph.replay, stream, flush, 50e-6)
    share = 1 / len(calls)

    def once() -> None:
        before = clock.seconds
        replay()
        clock.seconds = before + (clock.seconds - before) * share

    once.kept = kept  # type: ignore[attr-defined]
    return once
