"""pytest-benchmark cases: the operations on the tensors of ResNet-18 and ResNet-50."""

import pytest

from benchmarks.suite import device_time, parametrize, run_case


@parametrize(["ops"])
@pytest.mark.benchmark(timer=device_time)
def test_operation(benchmark, case):
    run_case(benchmark, case)
