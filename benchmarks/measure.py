"""Builds a case, compares its results with a reference, and times it."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import augmentation, clock, memory, models
from benchmarks.byte_model import conv_bytes_and_flops, moved_bytes
from benchmarks.cases import AugmentCase, Case, ModelCase, OpCase
from benchmarks.check import (
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    SUM_TOLERANCE,
    TF32_TOLERANCE,
    WrongResult,
    check,
)
from benchmarks.operations import DTYPES, LAYOUTS, Inputs, formula, make_inputs, smaller
from benchmarks.providers import PROVIDERS
from benchmarks.providers.base import Implementation
from benchmarks.sites import ConvSite

# An operation or an augmentation is timed for about BUDGET seconds, a whole net for STEP_BUDGET.
BUDGET = 0.25
STEP_BUDGET = 1.0


@dataclass(frozen=True)
class Ready:
    """A case that was checked and warmed up.

    Attributes:
        timed: the call to time.
        facts: fields of the record that are known before timing.
    """

    timed: clock.Timed
    facts: dict[str, Any]


def prepare(case: Case, device: torch.device, ticking: clock.DeviceClock) -> Ready:
    """Builds and checks a case, and makes it ready to be timed.

    Raises:
        Unavailable: if the provider is not installed, or does not support the device or the case.
        WrongResult: if the provider's result differs from the reference.
    """
    with clock.side_stream(device):
        if isinstance(case, OpCase):
            return _prepare_op(case, device, ticking)
        if isinstance(case, AugmentCase):
            return _prepare_augment(case, device, ticking)
        return _prepare_model(case, device, ticking)


def measure(case: Case, device: torch.device, ceilings: dict[str, float]) -> dict[str, Any]:
    """Measures a case. Returns the measured fields of its record. Times are in seconds.

    Raises:
        Unavailable: if the provider is not installed, or does not support the device or the case.
        WrongResult: if the provider's result differs from the reference.
    """
    ticking = clock.DeviceClock()
    ready = prepare(case, device, ticking)
    record = dict(ready.facts)
    budget = STEP_BUDGET if isinstance(case, ModelCase) else BUDGET
    rounds = clock.timed_rounds(ticking, ready.timed, budget)
    record |= summarize(clock.durations(ticking, ready.timed, rounds))
    return record | rates(record, ceilings)


def summarize(seconds: list[float]) -> dict[str, Any]:
    """Returns the median and the quartiles of the rounds' seconds, and the number of rounds."""
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive")
    return {
        "median": statistics.median(seconds),
        "q1": quartiles[0],
        "q3": quartiles[2],
        "rounds": len(seconds),
    }


def rates(record: dict[str, Any], ceilings: dict[str, float]) -> dict[str, float]:
    """Returns the bandwidth, and the shortest possible time divided by the median time.

    The shortest possible time is the longer of two times: to move the bytes at the bandwidth of a
    copy, and to compute the FLOPs at the speed of a matrix product. The result is empty if the
    record has no ``bytes``.

    Args:
        record: record with ``median`` in seconds, and optionally ``bytes`` and ``flops``.
        ceilings: ``copy`` in bytes/s and ``product`` in FLOP/s.
    """
    seconds, moved, flops = record["median"], record.get("bytes"), record.get("flops", 0)
    if moved is None or seconds <= 0:
        return {}
    limit = max(moved / ceilings["copy"], flops / ceilings["product"])
    return {"bytes_per_second": moved / seconds, "share": limit / seconds}


def fields_of(case: Case) -> dict[str, Any]:
    """Returns the fields of a record that identify its case."""
    own = {k: v for k, v in asdict(case).items() if k != "site"}
    if isinstance(case, OpCase):
        own |= {"operation": case.site.operation, "site": case.site.id}
    return {"id": case.id, "subject": case.subject, "suite": case.suite, **own}


def _prepare_op(case: OpCase, device: torch.device, ticking: clock.DeviceClock) -> Ready:
    torch.backends.cudnn.benchmark = True  # for every provider, as training scripts do
    provider = PROVIDERS[case.provider]
    if case.smoke:
        case = replace(case, site=smaller(case.site))
    dtype = DTYPES[provider.dtype_of(case)]

    def inputs() -> Inputs:
        return make_inputs(case.site, case.direction, case.batch, case.layout, dtype, device)

    bind = provider.prepare(case)
    with torch.set_grad_enabled(case.direction != "eval"):
        first = inputs()
        implementation = bind(first)
        error, results = verify(case, implementation, first)
        moved, flops = _bytes_and_flops(case, first)

        def make_call() -> Callable[[], object]:
            bound = bind(inputs())
            return bound.backward if case.direction == "backward" else bound.forward

        timed = _in_mode(
            clock.prepare(ticking, make_call, device, touched_bytes=moved),
            case.direction != "eval",
        )
    if timed.replayed is not None:
        # A graph that lacks a launch would be too fast, and its result would be wrong.
        timed.round()
        check("replayed result", timed.replayed, results, OUTPUT_TOLERANCE[dtype])
    return Ready(
        timed,
        {
            "bytes": moved, "flops": flops, "error": error, "method": timed.method,
            "host_seconds": timed.host_seconds, "note": implementation.note,
            "timed_dtype": provider.dtype_of(case),
        },
    )  # fmt: skip


def _in_mode(timed: clock.Timed, grad: bool) -> clock.Timed:
    """Returns a copy of ``timed`` whose rounds run with autograd enabled if ``grad`` is True."""

    def once() -> None:
        with torch.set_grad_enabled(grad):
            timed.round()

    return replace(timed, round=once)


def verify(
    case: OpCase, implementation: Implementation, inputs: Inputs
) -> tuple[float, Sequence[Tensor]]:
    """Compares an implementation with `benchmarks.operations.formula` in fp64.

    The reference for a convolution is in fp32, because fp64 takes too long.

    Args:
        case: the operation.
        implementation: implementation that is bound to ``inputs``.
        inputs: inputs that no call has used yet. Each call in training changes the running
            statistics, which are compared too.

    Returns:
        A tuple (error, results). ``error`` is the greatest relative error. ``results`` are the
        gradients if the case's direction is ``backward``, otherwise the outputs.

    Raises:
        WrongResult: if an error exceeds its tolerance, or if a dtype, the output's memory format or
            the number of results is wrong.
    """
    is_conv = isinstance(case.site, ConvSite)
    exact = inputs.to(torch.float32 if is_conv else torch.float64)
    dtype = inputs.x.dtype
    tolerance = OUTPUT_TOLERANCE[dtype]
    if is_conv:
        tolerance = max(tolerance, TF32_TOLERANCE)
    # The reference must not use TF32. For a batch norm in fp64, cuDNN is disabled, because it does
    # not support fp64.
    with torch.backends.cudnn.flags(enabled=is_conv, allow_tf32=False):
        expected = formula(case.site, case.direction != "eval")(exact)
    results = implementation.forward()
    errors = [check("output", results, expected, tolerance, dtype)]
    if not results[0].is_contiguous(memory_format=LAYOUTS[case.layout]):
        raise WrongResult(f"the output is not {case.layout}: its strides are {results[0].stride()}")
    if case.direction != "eval":
        limit = OUTPUT_TOLERANCE[torch.float32]
        errors.append(check("running statistic", inputs.buffers, exact.buffers, limit))
    if case.direction == "backward":
        gradients = torch.autograd.grad(expected, exact.leaves, exact.gradients)
        results = implementation.backward()
        if len(results) != len(gradients):
            raise WrongResult(f"{len(results)} gradients, expected {len(gradients)}")
        for index, pair in enumerate(zip(results, gradients, strict=True)):
            is_sum = pair[1].dim() == 1
            limits = SUM_TOLERANCE if is_sum else GRADIENT_TOLERANCE
            name = f"gradient {index}, of {'a parameter' if is_sum else 'a tensor'}, result"
            errors.append(check(name, pair[:1], pair[1:], limits[dtype], None if is_sum else dtype))
    return max(errors), results


def _bytes_and_flops(case: OpCase, inputs: Inputs) -> tuple[int, int]:
    itemsize = inputs.x.element_size()
    if isinstance(case.site, ConvSite):
        return conv_bytes_and_flops(case.site, case.batch, itemsize)
    return moved_bytes(case.site.operation, case.direction, inputs.x.numel(), itemsize), 0


def _prepare_model(case: ModelCase, device: torch.device, ticking: clock.DeviceClock) -> Ready:
    work = models.prepare(case, device)
    facts: dict[str, Any] = {"error": work.verify(), "timed_dtype": models.dtype_of(case)}
    if case.suite == "memory":
        facts |= memory.measure(work, device)
    timed = clock.prepare(ticking, lambda: work.run, device, launch=case.launch)
    facts |= {"method": timed.method, "host_seconds": timed.host_seconds, "images": case.batch}
    return Ready(timed, facts)


def _prepare_augment(case: AugmentCase, device: torch.device, ticking: clock.DeviceClock) -> Ready:
    work = augmentation.prepare(case, device)
    # For ``bnres-kernel`` only the device is timed. For the other providers the host's time is
    # included, because users wait for the host.
    launch = "auto" if case.provider == "bnres-kernel" else "eager"
    timed = clock.prepare(
        ticking, lambda: augmentation.prepare(case, device).run, device,
        touched_bytes=work.bytes_moved, launch=launch,
    )  # fmt: skip
    facts = {
        "error": work.verify(), "timed_dtype": case.dtype, "method": timed.method,
        "host_seconds": timed.host_seconds, "images": case.batch, "bytes": work.bytes_moved,
    }  # fmt: skip
    return Ready(timed, facts)
