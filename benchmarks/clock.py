"""A clock that advances only by the time of the calls that are timed.

On a GPU, the time of a call is the time between two events on the device. Before the first event
the L2 cache is flushed, and the device sleeps until the host has queued the launches. So the host's
time is not included.

`prepare` with ``launch="eager"`` times a loop of calls as in a user's program: the host's time is
included, and the cache is not flushed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]

# A call that takes less than this many seconds is timed in a CUDA graph of several calls. Two
# events are always at least a few microseconds apart, so they can't time one short call accurately.
# A loop of calls would also time the gaps between the launches.
GRAPH_BELOW = 100e-6
# The replay of a graph takes at least this many seconds, so that its launch takes negligible time.
LEAST_REPLAY = 500e-6
# The calls of a graph together touch at least this many times the size of the L2 cache, so that a
# call does not find its tensors in the cache.
COLD_FACTOR = 3
# A graph never contains more calls than this, even if the two conditions above need more.
MOST_COPIES = 64
# The warm-up takes at least this many seconds and makes at least this many calls, because a GPU
# raises its clock rate only under load.
WARMUP_SECONDS, WARMUP_CALLS = 0.15, 3
# The host's time for a call is the median over this many calls.
HOST_CALLS = 10
# A loop of calls takes about LOOP_SECONDS and makes at most MOST_LOOPS calls.
LOOP_SECONDS, MOST_LOOPS = 0.05, 20
# The device sleeps for a number of cycles: the wanted seconds times this clock rate in Hz. Real
# clock rates are lower, so it sleeps longer than wanted.
SLEEP_CYCLES = 2e9


class DeviceClock:
    """A timer for pytest-benchmark. It returns ``seconds``, which ``Timed.round`` advances."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@dataclass(frozen=True)
class Timed:
    """A call that is ready to be timed.

    Attributes:
        round: makes ``calls`` calls, and advances the clock by the mean seconds of a call.
        method: ``events`` times one call between two events. ``loop`` times consecutive calls that
            the host launches. ``graph`` times the replay of a CUDA graph. ``wall`` measures wall
            time on the CPU.
        host_seconds: seconds until a call returns. The call's kernels may not have run by then.
        calls: number of calls in a round.
        replayed: result of the first call in the graph, which each round overwrites. It is None if
            the method is not ``graph``.
    """

    round: Callable[[], None]
    method: str
    host_seconds: float
    calls: int = 1
    replayed: Any = None


def copies(touched_bytes: int, l2_bytes: int, seconds: float) -> int:
    """Returns how many calls, each with its own tensors, a graph should contain.

    The result is the least number that satisfies `COLD_FACTOR` and `LEAST_REPLAY`, but at most
    `MOST_COPIES`.

    Args:
        touched_bytes: bytes of memory that one call touches.
        l2_bytes: size of the L2 cache in bytes.
        seconds: time of one call.
    """
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
        clock: clock that the rounds advance.
        make_call: returns a call with new tensors. It is called several times if a graph contains
            several calls.
        device: device on which the call runs.
        touched_bytes: bytes of memory that a call touches.
        launch: how the call is timed on a GPU. On a CPU, every call is timed by itself.

            - ``auto`` times only the device: a short call in a CUDA graph of several calls, a
              longer call between two events.
            - ``graph`` times a CUDA graph of one call.
            - ``eager`` times a loop of calls as in a user's program. This includes the host's time,
              and the cache is not flushed.
    """
    if device.type != "cuda":
        return _on_cpu(clock, make_call())
    with torch.cuda.device(device):
        return _on_gpu(clock, make_call, touched_bytes, launch)


def durations(clock: DeviceClock, timed: Timed, rounds: int) -> list[float]:
    """Runs ``rounds`` rounds. Returns for each round by how many seconds the clock advanced."""
    found = []
    for _ in range(rounds):
        start = clock()
        timed.round()
        found.append(clock() - start)
    return found


def rounds_for(seconds: float, budget: float, least: int = 5, most: int = 100) -> int:
    """Returns how many rounds of ``seconds`` seconds fit into ``budget`` seconds.

    The result is at least ``least`` and at most ``most``.
    """
    return int(min(max(budget / max(seconds, 1e-9), least), most))


def timed_rounds(clock: DeviceClock, timed: Timed, budget: float) -> int:
    """Runs two rounds, and returns how many rounds fit into ``budget`` seconds."""
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
    """Makes a new stream current if the current stream is the default stream of a GPU.

    A CUDA graph can't be captured on the default stream. The work before the capture has to run on
    the new stream too: autograd accumulates a parameter's gradient on the stream of the first
    forward that used the parameter. If the capture is on another stream, it fails.
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
        once = _round(clock, [graph.replay], stream, flush, replay_host, results, calls)
        return Timed(once, "graph", host_seconds, count, results[0])


def _round(
    clock: DeviceClock,
    queued: Sequence[Call],
    stream: torch.cuda.Stream,
    flush: Call | None,
    host_seconds: float,
    replayed: Sequence[Any] = (),
    captured: Sequence[Call] = (),
) -> Callable[[], None]:
    """Returns a function that makes the calls, and advances the clock by the mean time of a call.

    If ``queued`` is the replay of a graph, the graph contains the calls ``captured``, whose results
    are ``replayed``. It uses the addresses of their tensors.
    """
    share = 1 / (len(replayed) or len(queued))

    # The default value of the argument keeps the graph's tensors alive.
    def once(kept: Any = (replayed, captured)) -> None:
        clock.seconds += share * _between_events(queued, stream, flush, host_seconds)

    return once


def cache_flush() -> Call:
    """Returns a call that evicts all data from the L2 cache.

    The call reads four times as many bytes as the cache has. It does not write, because the cache
    would write these bytes back to memory during the call that is timed.
    """
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    scratch = torch.zeros(size, dtype=torch.float32, device="cuda")
    return scratch.sum


def _warm_up(call: Call, stream: torch.cuda.Stream) -> None:
    call()
    stream.synchronize()  # Compiling does not count as warm-up.
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
    """Returns the seconds that all calls take together.

    If ``host_seconds`` is not 0, the device sleeps until the host has queued the calls.
    """
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
    """Captures the calls in one CUDA graph. Returns the graph and the result of each call."""
    graph = torch.cuda.CUDAGraph()
    results: list[Any] = []
    with torch.cuda.graph(graph, stream=stream):
        # Results that are alive have separate memory, so that no call overwrites another's result.
        results.extend(call() for call in calls)
    return graph, results
