"""Runs cases under pytest-benchmark. The ``bench_*.py`` files share this module."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks import clock, environment
from benchmarks.cases import Case, ModelCase, OpCase, select, smoke_cases, telling_cases
from benchmarks.measure import BUDGET, STEP_BUDGET, fields_of, prepare, rates
from benchmarks.providers.base import Unavailable
from bnres import use_backend

CLOCK = clock.DeviceClock()
# Cases with small inputs have this many rounds. They only show that the benchmark runs. Their times
# mean nothing.
SMOKE_ROUNDS = 2


def device_time() -> float:
    """Returns the seconds of all calls timed so far. See `benchmarks.clock.DeviceClock`."""
    return CLOCK()


@cache
def about() -> dict[str, Any]:
    """Describes the environment and measures the device's bandwidth and FLOP/s, once per run."""
    device = environment.default_device()
    return environment.describe(device) | {"ceilings": environment.measure_ceilings(device)}


def parametrize(suites: Sequence[str]) -> pytest.MarkDecorator:
    """Parametrizes a test with the cases of some suites. The ids of the test are the cases' ids.

    On a GPU the most important cases are used. Without a GPU the cases with small inputs are used.
    """
    chosen = telling_cases() if torch.cuda.is_available() else smoke_cases()
    cases = [case for suite in suites for case in select(chosen, suite=suite)]
    return pytest.mark.parametrize("case", cases, ids=[case.id for case in cases])


def run_case(benchmark: Any, case: Case) -> None:
    """Checks a case, then times it. Its record's fields are stored in ``benchmark.extra_info``."""
    with _route(case):
        _run_case(benchmark, case)


def _route(case: Case) -> AbstractContextManager[None]:
    """Selects ATen instead of Triton for nets and augmentations with small inputs.

    In Triton's interpreter they would take minutes.
    """
    slow = case.smoke and not isinstance(case, OpCase)
    return use_backend("aten") if slow else nullcontext()


def _run_case(benchmark: Any, case: Case) -> None:
    device = environment.default_device()
    try:
        ready = prepare(case, device, CLOCK)
    except Unavailable as error:
        benchmark.skipped = True
        pytest.skip(f"{case.provider}: {error}")
    benchmark.group = case.subject
    benchmark.extra_info |= fields_of(case) | ready.facts | {"environment": about()}
    rounds = SMOKE_ROUNDS
    if not case.smoke:
        budget = STEP_BUDGET if isinstance(case, ModelCase) else BUDGET
        rounds = clock.timed_rounds(CLOCK, ready.timed, budget)
    benchmark.pedantic(ready.timed.round, rounds=rounds)
    median = {"median": benchmark.stats.stats.median}
    benchmark.extra_info |= rates(ready.facts | median, about()["ceilings"])
