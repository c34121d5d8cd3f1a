"""Runs the operations on tensors of ResNet-18 and ResNet-50 under pytest-benchmark."""

import pytest

from benchmarks.suite import device_time, parametrize, run_case


@parametrize(["ops"])
@pytest.mark.benchmark(timer=device_time)
def test_operation(benchmark, case):
    run_case(benchmark, case)
