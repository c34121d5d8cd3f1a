"""Times cases with pytest-benchmark: the most important on a GPU, small ones on a CPU."""

from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks import clock, environment
from benchmarks.cases import Case, ModelCase, OpCase, smoke_cases, telling_cases
from benchmarks.measure import BUDGET, STEP_BUDGET, fields_of, prepare, rates
from benchmarks.providers.base import Unavailable
from bnres import use_backend

CLOCK = clock.DeviceClock()
# Cases with small inputs are timed in this many rounds. They only show that the benchmark runs.
SMOKE_ROUNDS = 2
CASES = telling_cases() if torch.cuda.is_available() else smoke_cases()


@cache
def about() -> dict[str, Any]:
    """Describes the environment and measures the device's bandwidth and FLOP/s, once per run."""
    device = environment.default_device()
    return environment.describe(device) | {"ceilings": environment.measure_ceilings(device)}


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
@pytest.mark.benchmark(timer=CLOCK)
def test_case(benchmark: Any, case: Case) -> None:
    """Checks and times a case, and stores the fields of its record in ``benchmark.extra_info``."""
    # In Triton's interpreter, nets and augmentations would take minutes, so ATen computes them.
    slow = case.smoke and not isinstance(case, OpCase)
    with use_backend("aten") if slow else nullcontext():
        _run(benchmark, case)


def _run(benchmark: Any, case: Case) -> None:
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
