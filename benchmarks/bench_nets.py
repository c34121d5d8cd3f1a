"""Runs training steps and inference of nets, and measures memory, under pytest-benchmark."""

import pytest

from benchmarks.suite import device_time, parametrize, run_case


@parametrize(["step", "infer", "memory"])
@pytest.mark.benchmark(timer=device_time)
def test_net(benchmark, case):
    run_case(benchmark, case)
    assert case.suite != "memory" or benchmark.extra_info["peak_bytes"] > 0
