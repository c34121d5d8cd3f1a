"""Tests that the fused max-pool returns the same bits as batch norm, activation and max_pool2d."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from bnres.functional import batch_norm_act_max_pool2d
from bnres.kernels import bn_forward, bn_max_pool, config, launch, reference
from bnres.kernels.device import ACTIVATIONS
from bnres.kernels.norm import Norm, RunningStatistics, Statistics, Sums
from tests.device import DEVICE
from tests.tolerances import assert_close

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Sizes are odd or even. Some shapes have only one row or one column of windows. In some shapes the
# channels don't fill whole vectors or blocks. The rows of contiguous tensors are whole vectors.
# Some shapes have more columns than one program processes.
SHAPES = [
    ((2, 8, 5, 7), "channels_last"),
    ((1, 24, 6, 9), "channels_last"),
    ((3, 64, 4, 14), "channels_last"),
    ((1, 72, 9, 1), "channels_last"),
    ((2, 5, 1, 4), "channels_last"),
    ((2, 100, 2, 3), "channels_last"),
    ((2, 5, 7, 16), "contiguous"),
    ((1, 3, 10, 48), "contiguous"),
    ((3, 65, 1, 32), "contiguous"),
]
# Each case has a shape, a layout, a dtype, and the number of programs that run at once. If this
# number is 1, each program processes all rows. If it is 64, each program processes one row. Each
# dtype is tested in both layouts.
CASES = [
    *((*case, torch.bfloat16, 1) for case in SHAPES),
    *((*SHAPES[i], dtype, 1) for i in (0, 6) for dtype in (torch.float16, torch.float32)),
    *((*SHAPES[i], torch.bfloat16, 64) for i in (0, 6)),
]


@pytest.fixture
def split(monkeypatch):
    """Returns a function that sets the number of programs that run at once."""

    def split(programs):
        monkeypatch.setattr(launch, "sm_count", lambda device: 1)
        for kernel in ("pool", "pool_dx"):
            tuning = replace(config.TUNING[kernel], programs_per_sm=programs)
            monkeypatch.setitem(config.TUNING, kernel, tuning)
        launch._plan_columns.cache_clear()

    yield split
    launch._plan_columns.cache_clear()


def draw(shape, layout, dtype, statistics=Statistics):
    """Returns x with ties, NaN and infinities, and a norm with positive, negative and 0 weights."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    for share, value in (
        (0.3, 0.5),
        (0.05, float("inf")),
        (0.05, -float("inf")),
        (0.05, float("nan")),
    ):
        x[torch.rand(shape) < share] = value
    mean, bias, weight = torch.randn(3, shape[1]).to(DEVICE)
    weight[0] = 0
    options = () if statistics is Statistics else (1e-3,)
    norm = Norm(statistics(mean, torch.rand_like(mean) + 0.5, *options), weight, bias)
    return x.to(DEVICE, dtype).contiguous(memory_format=FORMATS[layout]), norm


def same_bits(found, expected):
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(
        found.nan_to_num(0, 1e4, -1e4), expected.nan_to_num(0, 1e4, -1e4)
    )


def check_forward(x, norm, act):
    """Compares with max_pool2d, which chooses the first of equal maxima and the last of NaNs."""
    y, argmax, x_max = bn_max_pool.bn_max_pool(x, norm, act, 0.1, save=True)
    values, _ = bn_forward.bn_apply(x, norm, None, None, act, 0.1)
    expected, flat = F.max_pool2d(values.float(), 3, 2, 1, return_indices=True)
    assert same_bits(y.float(), expected)
    assert torch.equal(reference.pooled_offsets(argmax, x.shape[3]), flat)
    assert same_bits(x_max, x.flatten(2).gather(2, flat.flatten(2)).view_as(y))
    alone, *nothing = bn_max_pool.bn_max_pool(x, norm, act, 0.1)
    assert same_bits(alone, y) and nothing == [None, None]
    assert y.stride() == argmax.stride() == x_max.stride()


@pytest.mark.parametrize(("shape", "layout", "dtype", "programs"), CASES, ids=str)
def test_forward(shape, layout, dtype, programs, split):
    split(programs)
    check_forward(*draw(shape, layout, dtype), "relu")


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(
    ("shape", "layout"), [SHAPES[0], pytest.param(*SHAPES[6], marks=pytest.mark.slow)], ids=str
)
def test_every_activation(shape, layout, act):
    check_forward(*draw(shape, layout, torch.bfloat16, RunningStatistics), act)


@pytest.mark.parametrize(("shape", "layout", "dtype", "programs"), CASES, ids=str)
def test_dx(shape, layout, dtype, programs, split):
    split(programs)
    x, norm = draw(shape, layout, dtype)
    x = x.nan_to_num(1, 2, -2)
    for act, training in (("relu", True), ("silu", False)):
        y, argmax, _ = bn_max_pool.bn_max_pool(x, norm, act, 0.1, save=True)
        dy = torch.randn_like(y)
        sums = Sums(*torch.randn(2, shape[1]).to(DEVICE)) if training else None
        given = (dy, argmax, x, norm, act, 0.1, sums, 20)
        dx = bn_max_pool.bn_max_pool_backward_dx(*given)
        wide = tree_map(
            lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t,
            given,
        )
        assert dx.stride() == x.stride()
        assert_close(dx, reference.bn_max_pool_backward_dx_ref(*wide), dtype)


def test_has_pool_kernel():
    taken = config.has_pool_kernel
    assert taken((2, 3, 7, 9), False, 2) and not taken((2, 3, 7, 9), False, 8)
    assert not taken((2**15, 64, 32, 32), False, 2)
    assert taken((2, 3, 7, 16), True, 2) and not taken((2, 3, 16, 8), True, 2)
    assert taken((2, 3, 7, 8), True, 4)


@pytest.mark.parametrize(
    ("change", "dtype", "fuses"),
    [
        ({}, torch.float32, True),
        ({"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1)}, torch.float32, True),
        ({}, torch.float64, False),
        ({"kernel_size": 2}, torch.float32, False),
        ({"stride": None}, torch.float32, False),
        ({"padding": (1, 0)}, torch.float32, False),
        ({"dilation": 2}, torch.float32, False),
        ({"ceil_mode": True}, torch.float32, False),
    ],
    ids=str,
)
def test_which_poolings_are_fused(change, dtype, fuses):
    x = torch.randn(2, 3, 6, 8, dtype=dtype, device=DEVICE, requires_grad=True)
    pooling = {"kernel_size": 3, "stride": 2, "padding": 1} | change
    y = batch_norm_act_max_pool2d(x, None, None, training=True, **pooling)
    assert ("Fused" in y.grad_fn.name()) == fuses
    normed = F.relu(F.batch_norm(x.double(), None, None, training=True))
    assert_close(y, F.max_pool2d(normed, **pooling), dtype)


def test_tensor_that_is_contiguous_and_channels_last():
    """A tensor with one channel can be both contiguous and channels_last.

    The pooling kernel does not support contiguous tensors whose rows are not whole vectors. The
    rows in this test are not whole vectors.
    """
    x = torch.randn(2, 1, 6, 7, device=DEVICE).contiguous(memory_format=torch.channels_last)
    for given in (x, torch.randn(2, 3, 6, 9, device=DEVICE)[:, :1, :, ::2]):
        y = batch_norm_act_max_pool2d(
            given, None, None, kernel_size=3, stride=2, padding=1, training=True
        )
        normed = F.relu(F.batch_norm(given.double(), None, None, training=True))
        assert_close(y, F.max_pool2d(normed, 3, 2, 1), torch.float32)


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("batch", [1, 16, 32, 256, 1000])
def test_rows_are_split_over_the_whole_chip(batch, contiguous):
    rows = 56
    found = config.column_config("pool", (batch, 64, 2 * rows, 112), contiguous, 2, rows, 132)
    blocks = -(-found.columns // found.tile.sub_rows)
    assert found.programs == blocks * -(-rows // found.rows_per_program)
    at_once = 132 * config.TUNING["pool"].programs_per_sm
    turns = -(-found.programs // at_once)
    # The used share of the chip: the number of rows, divided by the number of rows that the chip
    # could process in the same time.
    used = blocks * rows / (at_once * turns * found.rows_per_program)
    assert found.programs >= 132 and used >= (0.75 if batch >= 16 else 0.25)
