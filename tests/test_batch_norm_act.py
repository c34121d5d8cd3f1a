"""Tests values, gradients and running statistics of `batch_norm_act` against fp64 references."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bnres.functional import batch_norm_act
from bnres.kernels.reference import ACTIVATION_FORMULAS
from bnres.nn import BatchNorm2d, BatchNormAct2d
from tests.device import DEVICE
from tests.tolerances import TOLERANCE, assert_close, formula_dtype

SHAPES = [
    (2, 3, 5, 5),
    (4, 16, 7, 7),
    (3, 8, 4, 4),
    (5, 130),
    (7, 65, 3),
    (2, 1, 3, 3, 3),
    (3, 63, 1, 1),
]


def channels_last(t):
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


# Every combination of the dtype and the three flags occurs once, with one of the shapes. Each shape
# occurs with each dtype, and with both values of each flag.
CASES = [
    (dtype, SHAPES[(i + 2 * j + k) % len(SHAPES)], last, residual, training)
    for i, dtype in enumerate(TOLERANCE)
    for j, (last, training) in enumerate(
        [(False, True), (True, True), (False, False), (True, False)]
    )
    for k, residual in enumerate([False, True])
]


@pytest.mark.parametrize(("dtype", "shape", "last", "has_residual", "training"), CASES, ids=str)
def test_values_and_gradients(dtype, shape, last, has_residual, training):
    torch.manual_seed(0)
    channels = shape[1]
    x, residual, dy = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(3))
    x = x * 2 + 3
    if last:
        x, residual, dy = (channels_last(t) for t in (x, residual, dy))
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.rand(channels, dtype=stats, device=DEVICE) + 0.5
    bias, mean = (torch.randn(channels, dtype=stats, device=DEVICE) for _ in range(2))
    var = torch.rand(channels, dtype=stats, device=DEVICE) + 0.5

    inputs = [t.detach().requires_grad_() for t in (x, weight, bias, residual)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    wide_mean, wide_var = mean.double(), var.double()
    y = batch_norm_act(
        inputs[0], mean, var, *inputs[1:3], residual=inputs[3] if has_residual else None,
        training=training,
    )  # fmt: skip
    z = F.batch_norm(wide[0], wide_mean, wide_var, wide[1], wide[2], training)
    expected = F.relu(z + wide[3] if has_residual else z)
    assert y.dtype == dtype
    assert y.stride() == x.stride()
    assert_close(y, expected, dtype)
    assert_close(mean, wide_mean, stats)
    assert_close(var, wide_var, stats)

    used = 4 if has_residual else 3
    grads = torch.autograd.grad(y, inputs[:used], dy)
    expected_grads = torch.autograd.grad(expected, wide[:used], dy.double())
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected_grad, dtype)


@pytest.mark.parametrize(
    "act", [None, "relu6", "leaky_relu", "hardswish", "sigmoid", "silu", "gelu", "gelu_tanh"]
)
@pytest.mark.parametrize("has_residual", [False, True], ids=["plain", "residual"])
def test_activations(act, has_residual):
    torch.manual_seed(1)
    x, residual, dy = (
        torch.randn(4, 5, 3, 3, dtype=torch.float64, device=DEVICE) * 3 for _ in range(3)
    )
    inputs = [x.requires_grad_(), residual.requires_grad_()]
    y = batch_norm_act(
        x, None, None, residual=residual if has_residual else None, act=act, training=True
    )
    z = F.batch_norm(x, None, None, training=True)
    expected = ACTIVATION_FORMULAS[act or "identity"](z + residual if has_residual else z, 0.01)
    assert_close(y, expected, formula_dtype(act))
    used = 2 if has_residual else 1
    grads = torch.autograd.grad(y, inputs[:used], dy)
    for grad, want in zip(grads, torch.autograd.grad(expected, inputs[:used], dy), strict=True):
        assert_close(grad, want, torch.float64)


INF, NAN = float("inf"), float("nan")
# Each activation's values at inf, -inf and NaN, and its derivatives at inf, -inf and NaN.
NOT_FINITE = {
    "identity": ([INF, -INF, NAN], [1, 1, 1]),
    "relu": ([INF, 0, NAN], [1, 0, 1]),
    "relu6": ([6, 0, NAN], [0, 0, 1]),
    "leaky_relu": ([INF, -INF, NAN], [1, 0.25, 0.25]),
    "hardswish": ([INF, NAN, NAN], [1, 0, NAN]),
    "sigmoid": ([1, 0, NAN], [0, 0, NAN]),
    "silu": ([INF, NAN, NAN], [NAN, NAN, NAN]),
    "gelu": ([INF, NAN, NAN], [NAN, NAN, NAN]),
    "gelu_tanh": ([INF, NAN, NAN], [NAN, NAN, NAN]),
}
# At NaN, torch's vectorised code and its scalar code compute different derivatives of these
# activations.
VARYING_AT_NAN = ("relu6", "hardswish")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act", NOT_FINITE)
def test_infinity_and_nan(act, dtype):
    z = torch.tensor([INF, -INF, NAN], dtype=dtype)
    values, slopes = (torch.tensor(v, dtype=dtype) for v in NOT_FINITE[act])
    same = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)

    leaf = z.clone().requires_grad_()
    # Each element is computed in a call of its own. For several elements on the CPU, torch calls
    # oneDNN, which returns NaN for gelu(inf). For a single element, torch's own gelu returns inf.
    y = torch.cat([ACTIVATION_FORMULAS[act](single, 0.25) for single in leaf.split(1)])
    (slope,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    same(y, values)
    known = 2 if act in VARYING_AT_NAN else 3
    same(slope[:known], slopes[:known])

    x = z.to(DEVICE).view(1, 3, 1, 1).expand(2, 3, 2, 2).contiguous()
    norm = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    options = {"act": act, "act_kwargs": {"negative_slope": 0.25} if act == "leaky_relu" else {}}
    for residual in (None, torch.zeros_like(x)):
        leaf = x.clone().requires_grad_()
        y = batch_norm_act(leaf, *norm, residual=residual, eps=0.0, **options)
        (slope,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        same(y.cpu(), values.view(1, 3, 1, 1).expand(2, 3, 2, 2))
        same(slope.cpu(), slopes.view(1, 3, 1, 1).expand(2, 3, 2, 2))


@pytest.mark.parametrize("module", [BatchNorm2d, BatchNormAct2d])
def test_module_counts_batches_and_keeps_torch_keys(module):
    bn = module(3, momentum=None).to(DEVICE)
    assert list(bn.state_dict()) == list(torch.nn.BatchNorm2d(3).state_dict())
    x = torch.randn(4, 3, 2, 2, device=DEVICE)
    bn(x)
    bn(x + 1)
    assert bn.num_batches_tracked == 2
    torch.testing.assert_close(bn.running_mean, (x + 0.5).mean((0, 2, 3)), rtol=0, atol=1e-6)


def test_large_mean_keeps_the_variance():
    torch.manual_seed(3)
    x = torch.randn(64, 4, 7, 7, device=DEVICE) + 1e4
    var = torch.zeros(4, device=DEVICE)
    batch_norm_act(x, None, var, training=True, momentum=1.0)
    expected = x.double().var((0, 2, 3))
    torch.testing.assert_close(var.double(), expected, rtol=1e-6, atol=0)
