"""Convolution with sums of its output for the batch norm behind it: kernel, gradients, routes."""

import pytest
import torch

from bnres.kernels import conv_sums as kernels
from bnres.kernels.bn_forward import bn_stats
from bnres.kernels.conv_config import ConvConfig, ConvShape
from bnres.kernels.conv_sums import conv_sums
from bnres.kernels.reference import bn_stats_ref, conv_sums_ref
from tests.device import DEVICE
from tests.test_conv import CASES, double, random
from tests.tolerances import assert_close

LAST = torch.channels_last
STEM = (2, 3, 14, 14, 20, ConvShape(7, 7, 2, 2, 3, 3, 1, 1))


def draw(case, dtype):
    torch.manual_seed(0)
    n, c, h, w, k, shape = case
    filter = random(k, c, shape.kernel_h, shape.kernel_w) / (c * shape.taps) ** 0.5
    return random(n, c, h, w, dtype=dtype), filter.to(dtype).contiguous(memory_format=LAST), shape


# The interpreter's tl.dot takes no bf16.
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*CASES, STEM], ids=lambda c: f"{c[1]}to{c[4]}")
def test_kernel_agrees_with_its_reference(case, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x, filter, shape = draw(case, dtype)
    y, sums = conv_sums(x, filter, shape)
    expected, _ = conv_sums_ref(*double(x, filter), shape)
    assert y.dtype == dtype and y.is_contiguous(memory_format=LAST)
    assert_close(y, expected, dtype)
    # The sums are those of y as it is stored, so their error is fp32's whatever the dtype.
    mean, var = random(y.shape[1]), torch.rand(y.shape[1], device=DEVICE)
    wide_mean, wide_var = double(mean, var)
    stats = bn_stats(y, mean, var, 0.3, 1e-3, sums=sums)
    wide = bn_stats_ref(y.double(), wide_mean, wide_var, 0.3, 1e-3)
    for actual, exact in zip((*stats, mean, var), (*wide, wide_mean, wide_var), strict=True):
        assert_close(actual, exact, torch.float32)


def test_many_tiles_and_splits(monkeypatch):
    """Of channels far from zero, whose squares would cancel, and one that is constant."""
    monkeypatch.setattr(kernels, "TILES_PER_SPLIT", 16)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x = random(3, 4, 20, 31)
    x[:, 0] = 1
    filter = torch.zeros(5, 4, 1, 1, device=DEVICE)
    filter[:, 0, 0, 0] = torch.tensor([0.0, 1.0, -300.0, 1e4, 7.0])
    filter[:4, 1, 0, 0] = 1
    filter = filter.contiguous(memory_format=LAST)
    shape = ConvShape(1, 1, 1, 1, 0, 0, 1, 1)
    config = ConvConfig(16, 16, 16, num_warps=1, num_stages=1)
    y, sums = conv_sums(x, filter, shape, config=config)
    assert sums.shape == (2 * 8 + 1, 5)  # 117 tiles
    mean, rstd = bn_stats(y, None, None, 0.1, 1e-5, sums=sums)
    exact_mean, exact_rstd = bn_stats_ref(y.double(), None, None, 0.1, 1e-5)
    error = (mean - exact_mean).abs() * exact_rstd
    assert error.max() <= 1e-3  # 1e4 · 2⁻²⁴, the mean itself rounded to fp32
    assert ((rstd / exact_rstd - 1).abs() <= 1e-6).all()
    again, same = conv_sums(x, filter, shape, config=config)
    assert torch.equal(y, again) and torch.equal(sums, same)


def test_values_that_are_no_numbers():
    """As the pass over a tensor that `bn_stats` makes itself."""
    x, filter, shape = draw(CASES[0], torch.float32)
    for value in (float("inf"), float("nan")):
        x[0, 0, 0, 0] = value
        y, sums = conv_sums(x, filter, shape)
        found = bn_stats(y, None, None, 0.1, 1e-5, sums=sums)
        for actual, expected in zip(found, bn_stats(y, None, None, 0.1, 1e-5), strict=True):
            assert torch.equal(actual.isfinite(), expected.isfinite())


def test_empty_batch():
    x, filter = torch.empty(0, 8, 4, 4, device=DEVICE), random(3, 8, 1, 1)
    y, sums = conv_sums(x, filter, ConvShape(1, 1, 1, 1, 0, 0, 1, 1))
    assert y.shape == (0, 3, 4, 4) and torch.equal(sums, torch.zeros_like(sums))
