"""The timing core: a clock that advances by the time of what is timed, and by nothing else.

It is the ``timer`` of pytest-benchmark, and `benchmarks.measure` reads it too. On a GPU it is the
time between two events on the device, with a cold L2 cache; emptying the cache, queueing and waiting
are not timed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]

# Shorter ones are replayed from a CUDA graph, as the time between two events is no shorter than
# some microseconds, and the host's gaps count among them.
GRAPH_BELOW = 100e-6
# A replay takes at least so long, so that its own launch does not count ...
LEAST_REPLAY = 500e-6
# ... and touches so many times the L2 cache that it serves nobody twice, in at most so many calls.
COLD_FACTOR = 3
MOST_COPIES = 64
# Clocks rise while a GPU works, and caches fill: seconds and calls before anything is timed.
WARMUP_SECONDS, WARMUP_CALLS = 0.15, 3
HOST_CALLS = 10
# A loop as a user runs it is timed over so long, and so many calls at most.
LOOP_SECONDS, MOST_LOOPS = 0.05, 20
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
        round: does it, and advances the clock by the seconds of one call.
        method: ``events``, ``loop`` (calls one behind the other, as the host launches them),
            ``graph`` (CUDA graph) or ``wall`` (on the CPU).
        host_seconds: time until a call returns, its work perhaps still queued.
        calls: how many a round makes.
        replayed: what the first call of a graph returned, written anew by each round.
    """

    round: Callable[[], None]
    method: str
    host_seconds: float
    calls: int = 1
    replayed: Any = None


def copies(touched_bytes: int, l2_bytes: int, seconds: float) -> int:
    """Independent calls that a graph needs for its memory to be cold and its launch not to count."""
    cold = -(-COLD_FACTOR * l2_bytes // max(touched_bytes, 1))
    long = -(-LEAST_REPLAY // seconds)
    return int(min(max(cold, long, 1), MOST_COPIES))


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
    """Rounds of ``seconds`` each that fit into ``budget`` seconds."""
    return int(min(max(budget / max(seconds, 1e-9), least), most))


def timed_rounds(clock: DeviceClock, timed: Timed, budget: float) -> int:
    """Rounds that fit into ``budget`` seconds, found from two of them."""
    return rounds_for(timed.calls * durations(clock, timed, 2)[-1], budget)


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


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Makes a stream other than the default one current; nothing changes without a GPU.

    A CUDA graph can't be captured on the default stream. Everything before the capture has to run
    on the side stream too: autograd accumulates a parameter's gradient on the stream of the forward
    that made the accumulating node, and a capture fails when that stream is not part of it.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.current_stream(device)
    if before != torch.cuda.default_stream(device):
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        yield


def _on_gpu(
    clock: DeviceClock, make_call: Callable[[], Call], touched_bytes: int, launch: str
) -> Timed:
    device = torch.device("cuda", torch.cuda.current_device())
    with side_stream(device):
        stream = torch.cuda.current_stream()
        flush = cache_flush()
        call = make_call()
        _warm_up(call, stream)
        host_seconds = _host_seconds(call, stream)
        estimate = min(_between_events([call], stream, flush, host_seconds) for _ in range(3))
        if launch == "eager":
            loops = int(min(max(LOOP_SECONDS / estimate, 2), MOST_LOOPS))
            once = _round(clock, [call] * loops, stream, None, 0.0)
            return Timed(once, "loop", host_seconds, loops)
        if launch == "auto" and estimate >= GRAPH_BELOW:
            once = _round(clock, [call], stream, flush, host_seconds)
            return Timed(once, "events", host_seconds)
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        count = copies(touched_bytes, l2, estimate) if launch == "auto" else 1
        calls = [call, *(make_call() for _ in range(count - 1))]
        for each in calls[1:]:
            each()
        stream.synchronize()
        graph, results = _captured(calls, stream)
        replay_host = _host_seconds(graph.replay, stream)
        once = _round(clock, [graph.replay], stream, flush, replay_host, results)
        return Timed(once, "graph", host_seconds, count, results[0])


def _round(
    clock: DeviceClock,
    queued: Sequence[Call],
    stream: torch.cuda.Stream,
    flush: Call | None,
    host_seconds: float,
    replayed: Sequence[Any] = (),
) -> Callable[[], None]:
    """A round of some calls, or of a graph of some; the results of a graph are kept with it."""
    share = 1 / (len(replayed) or len(queued))

    def once() -> None:
        clock.seconds += share * _between_events(queued, stream, flush, host_seconds)

    return once


def cache_flush() -> Call:
    """A call that reads four times the size of the L2 cache, which evicts what was in it.

    It reads, because lines that it had written would be in the cache afterwards, and would be
    written back to memory while something else is timed.
    """
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    scratch = torch.zeros(size, dtype=torch.float32, device="cuda")
    return scratch.sum


def _warm_up(call: Call, stream: torch.cuda.Stream) -> None:
    call()
    stream.synchronize()  # what compiles at the first call does not count
    start, calls = time.perf_counter(), 1
    while calls < WARMUP_CALLS or time.perf_counter() - start < WARMUP_SECONDS:
        call()
        stream.synchronize()
        calls += 1


def _host_seconds(call: Call, stream: torch.cuda.Stream) -> float:
    found = []
    for _ in range(HOST_CALLS):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
        stream.synchronize()
    return sorted(found)[len(found) // 2]


def _between_events(
    calls: Sequence[Call], stream: torch.cuda.Stream, flush: Call | None, host_seconds: float
) -> float:
    """Seconds of the calls; the device sleeps until the host has queued all of them."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        if flush is not None:
            flush()
        if host_seconds:
            torch.cuda._sleep(int(2 * host_seconds * SLEEP_CYCLES))
        start.record()
        for call in calls:
            call()
        end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _captured(
    calls: Sequence[Call], stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """One CUDA graph of all calls, each with tensors of its own, and what they return."""
    graph = torch.cuda.CUDAGraph()
    results: list[Any] = []
    with torch.cuda.graph(graph, stream=stream):
        # Kept until all are captured, or the next call would be given the same memory.
        results.extend(call() for call in calls)
    return graph, results
