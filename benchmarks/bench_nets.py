"""pytest-benchmark cases: training steps and inference of whole nets, and the memory of a step."""

import pytest

from benchmarks.suite import device_time, parametrize, run_case


@parametrize(["step", "infer", "memory"])
@pytest.mark.benchmark(timer=device_time)
def test_net(benchmark, case):
    run_case(benchmark, case)
    assert case.suite != "memory" or benchmark.extra_info["peak_bytes"] > 0
