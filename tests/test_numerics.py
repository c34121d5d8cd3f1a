"""Tests that errors on hard inputs are not much larger than ATen's errors.

The limit is 1.5 times the larger of ATen's error and `dtype_floor`.
"""

import pytest
import torch
import torch.nn.functional as F

from bnres.functional import batch_norm_act
from tests.device import DEVICE
from tests.tolerances import TOLERANCE, assert_close

N, C, SIZE = 8, 6, 14
# Each dtype's machine epsilon.
EPSILON = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def draw(kind, dtype):
    torch.manual_seed(7)
    x = torch.randn(N, C, SIZE, SIZE)
    if kind.startswith("mean"):
        x = x + float(kind.removeprefix("mean "))
    elif kind == "constant":
        x = torch.full_like(x, 3.7)
    elif kind == "denormal":
        x = x * 1e-40
    elif kind == "large":
        x = (x * 2e4).clamp(-65504, 65504)
    elif kind == "outlier":
        x[0, :, 0, 0] = 3e4
    return x.to(DEVICE).to(dtype)


KINDS = ("mean 0", "mean 1e4", "mean -1e5", "constant", "denormal", "outlier")
CASES = [(kind, torch.float32) for kind in KINDS]
CASES += [("large", torch.float16), ("large", torch.bfloat16), ("mean 100", torch.bfloat16)]


def dtype_floor(name, dtype, want, x):
    """Returns the error that rounding in ``dtype`` may cause for any order of summation.

    The test allows 1.5 times this error even if ATen's error is smaller. On the CPU, ATen's error
    can be smaller, because ATen sums in fp64.
    """
    epsilon, fp32 = EPSILON[dtype], EPSILON[torch.float32]
    largest = max(want.abs().max().item(), 1e-30)
    if name == "running_mean":  # terms are rounded a few times; momentum is 0.1
        return 4 * fp32 * 0.1 * x.abs().mean((0, 2, 3)).max().item()
    if name in ("running_var", "dweight", "dbias"):  # random errors of n terms grow like √n
        return epsilon * (N * SIZE * SIZE) ** 0.5 * largest
    # The values of y or dx are rounded. They are also wrong by the mean's rounding error in fp32,
    # divided by the channel's standard deviation.
    shift = (x.mean((0, 2, 3)).abs() * (x.var((0, 2, 3)) + 1e-5).rsqrt()).max().item()
    return epsilon * 4 * largest + fp32 / 2 * shift * largest / 4


@pytest.mark.parametrize(("kind", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_error_is_no_larger_than_atens(kind, dtype, last):
    x = draw(kind, dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    dy = torch.randn_like(x, dtype=torch.float32).to(dtype)
    weight, bias = torch.rand(C, device=DEVICE) + 0.5, torch.randn(C, device=DEVICE)

    def run(function, wide):
        cast = torch.double if wide else None
        a, w, b, g = (t.to(cast) if wide else t for t in (x, weight, bias, dy))
        a, w, b = (t.detach().clone().requires_grad_() for t in (a, w, b))
        mean = torch.zeros(C, dtype=w.dtype, device=DEVICE)
        var = torch.ones(C, dtype=w.dtype, device=DEVICE)
        y = function(a, mean, var, w, b, training=True)
        return [y.detach(), mean, var, *torch.autograd.grad(y, (a, w, b), g)]

    exact = run(F.batch_norm, wide=True)
    aten = run(F.batch_norm, wide=False)
    ours = run(lambda *args, **kw: batch_norm_act(*args, act=None, **kw), wide=False)
    names = ("y", "running_mean", "running_var", "dx", "dweight", "dbias")
    for name, want, theirs, got in zip(names, exact, aten, ours, strict=True):
        error = (got.double() - want).abs().max().item()
        reference = (theirs.double() - want).abs().max().item()
        floor = dtype_floor(name, got.dtype, want, x.double())
        assert error <= 1.5 * max(reference, floor), (name, error, reference, floor)


def test_nan_stays_in_its_channel_forward_and_backward():
    x = draw("mean 0", torch.float32)
    x[1, 2, 0, 0] = float("nan")
    x.requires_grad_()
    y = batch_norm_act(x, None, None, training=True)
    expected = F.relu(F.batch_norm(x, None, None, training=True))
    assert torch.equal(y.isnan(), expected.isnan())
    dy = torch.ones_like(y)
    ours, theirs = (torch.autograd.grad(t, x, dy)[0] for t in (y, expected))
    assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("has_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("act", ["relu", "relu6", "leaky_relu", "hardswish"])
def test_derivatives_where_activations_have_a_kink(act, has_residual):
    """With the weight 0, z is exactly the bias. For relu and a residual, backward reads a mask."""
    bias = torch.tensor([-3.0, -0.0, 0.0, 3.0, 6.0, 1.0], device=DEVICE, requires_grad=True)
    weight, x = torch.zeros_like(bias), draw("mean 0", torch.float32)
    residual = torch.zeros_like(x, requires_grad=True)
    dy, found = torch.randn_like(x), []
    given = residual if has_residual else None
    y = batch_norm_act(x, None, None, weight, bias, residual=given, act=act, training=True)
    z = F.batch_norm(x, None, None, weight, bias, training=True)
    wanted = getattr(F, act)(z + residual if has_residual else z)
    inputs = (bias, residual) if has_residual else (bias,)
    for out in (y, wanted):
        found.append((out, *torch.autograd.grad(out, inputs, dy)))
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected, torch.float32)


def test_same_bits_from_run_to_run():
    x = draw("mean 100", torch.float32).requires_grad_()
    dy = torch.randn_like(x)
    runs = []
    for _ in range(2):
        y = batch_norm_act(x, None, None, residual=x.detach(), training=True)
        runs.append((y, torch.autograd.grad(y, x, dy)[0]))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_tolerances_name_every_dtype():
    assert set(TOLERANCE) == {torch.float16, torch.bfloat16, torch.float32, torch.float64}
