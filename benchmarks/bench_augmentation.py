"""pytest-benchmark cases: chains of augmentations at the image sizes of CIFAR and ImageNet."""

import pytest

from benchmarks.suite import device_time, parametrize, run_case


@parametrize(["augment"])
@pytest.mark.benchmark(timer=device_time)
def test_augmentation(benchmark, case):
    run_case(benchmark, case)
