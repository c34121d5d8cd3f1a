"""Runs chains of augmentations under pytest-benchmark, on images like CIFAR's and ImageNet's."""

import pytest

from benchmarks.suite import device_time, parametrize, run_case


@parametrize(["augment"])
@pytest.mark.benchmark(timer=device_time)
def test_augmentation(benchmark, case):
    run_case(benchmark, case)
