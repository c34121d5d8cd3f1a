"""Tests of the estimates of training on many GPUs, and of their comparison with gloo."""

from dataclasses import replace

import pytest
import torch

from benchmarks import scaling
from benchmarks.environment import ROOT
from benchmarks.scaling import Cluster, Protocol, exposed, fit, ring, step, traffic
from bnres import models


def test_traffic_of_resnet18():
    found = traffic("resnet18")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in models.resnet18().parameters())
    assert found.gradients == 4 * parameters == 46_758_048
    # The last site of each of the three down-sampling blocks has two batch norms, so its channels
    # are counted twice.
    assert found.sites == (64,) * 5 + (128, 256, 128, 128, 256, 512, 256, 256, 512, 1024, 512, 512)
    assert found.forward[0] == 4 * 3 * 64 and found.backward[0] == 4 * 2 * 64
    assert found.buckets == [1 << 20, 25 << 20, 46_758_048 - (26 << 20)]
    # In a ring of two GPUs, each GPU sends two messages to all-reduce one of the 3 buckets, and one
    # message for an all-gather. Each of the 17 sites makes one all-gather in forward and one in
    # backward. They send 12 and 8 bytes per channel. The sites have 4,800 channels in total.
    assert found.sent(2) == (46_758_048, 2 * 3, 20 * 4_800, 2 * 17)


def test_collectives_by_hand():
    cluster = Cluster(gpus=2, nvlink=1e9, network=5e8)
    # An all-reduce in a ring of two GPUs has two steps. Each GPU sends as many bytes as the tensor
    # has.
    assert cluster.all_reduce(10**9, 2) == pytest.approx(8.4e-6 + 2 * 3.4e-6 + 1.0)
    # In an all-gather of eight GPUs in four nodes, each GPU receives 7 tensors over the network.
    # NCCL's protocol for small tensors uses a quarter of the bandwidth for data.
    latency = 3.6e-6 + 4 * 0.47e-6 + 3 * 2.7e-6
    assert cluster.all_gather(100, 8) == pytest.approx(latency + 700 / (5e8 / 4))
    slow = replace(cluster, latency=2.0)
    assert slow.all_gather(100, 8) == pytest.approx(2 * latency + 700 / (5e8 / 4))


def test_gradients_are_hidden_by_a_backward_that_is_long_enough():
    buckets = [scaling.FIRST_BUCKET, scaling.BUCKET]
    # The last bucket is sent after backward. The first is sent during backward, if there is time.
    assert exposed(buckets, 10.0, lambda _: 1.0) == pytest.approx(1.0)
    assert exposed(buckets, 0.0, lambda _: 1.0) == pytest.approx(2.0)


def test_without_communication_a_step_takes_the_time_of_one_gpu():
    free = Cluster(nvlink=float("inf"), network=float("inf"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RING", "TREE"):
            patch.setattr(scaling, name, (Protocol(0.0, 0.0, 0.0, 1.0),))
        assert step("resnet18", 1024, free, "all_gather") == scaling.STEPS["resnet18"][0]
    assert step("resnet18", 1024, Cluster(), "all_gather") > step("resnet18", 1024, Cluster())


def test_a_ring_is_fitted_from_two_sizes():
    medians = [ring(size, 2, 3e-6, 2e9) for size in scaling.SIZES]
    assert fit(medians, 2) == pytest.approx((3e-6, 2e9))


@pytest.mark.slow
def test_the_page_shows_the_model():
    page = (ROOT / "docs" / "several-gpus.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- scaling: begin -->")[2].partition("<!-- scaling: end -->")[0]
    assert shown.strip() == scaling.table().strip()


@pytest.mark.slow
def test_gloo_is_compared_with_the_model():
    assert scaling.gloo_table().count("of measured") == 6
