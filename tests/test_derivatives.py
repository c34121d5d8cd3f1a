"""First, second, third and forward-mode derivatives of the fused operation."""

import pytest
import torch
from torch.autograd import forward_ad

from bnres import nn
from bnres.functional import (
    batch_norm_act,
    batch_norm_act_max_pool2d,
    dual_batch_norm_act,
)
from bnres.kernels.reference import ACTIVATION_FORMULAS
from tests.device import DEVICE
from tests.tolerances import assert_close


@pytest.mark.parametrize("act", [None, "relu", "silu"])
@pytest.mark.parametrize("has_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_of_gradients(act, has_residual, training):
    torch.manual_seed(2)
    x, residual = (torch.randn(3, 2, 1, 1, dtype=torch.float64, device=DEVICE) for _ in range(2))
    weight, bias, mean = (torch.randn(2, dtype=torch.float64, device=DEVICE) for _ in range(3))
    var = torch.rand(2, dtype=torch.float64, device=DEVICE) + 0.5
    inputs = (x, weight, bias, residual) if has_residual else (x, weight, bias)

    def run(x, weight, bias, residual=None):
        stats = (None, None) if training else (mean, var)
        return batch_norm_act(
            x, *stats, weight, bias, residual=residual, act=act, training=training
        )

    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.BatchNorm1d, (3, 2)),
        (nn.BatchNorm2d, (3, 2, 1, 1)),
        (nn.BatchNorm3d, (3, 2, 1, 1, 1)),
        (nn.BatchNormAct1d, (3, 2)),
        (nn.BatchNormAct2d, (3, 2, 1, 1)),
        (nn.BatchNormAct3d, (3, 2, 1, 1, 1)),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else "",
)
def test_gradients_of_modules(module, shape):
    torch.manual_seed(5)
    bn = module(2, track_running_stats=False, dtype=torch.float64, device=DEVICE)
    x = torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(bn, x)
    assert torch.autograd.gradgradcheck(bn, x)


def inputs():
    torch.manual_seed(4)
    x, residual = (torch.randn(4, 3, 2, 2, dtype=torch.float64, device=DEVICE) for _ in range(2))
    weight, bias, mean = (torch.randn(3, dtype=torch.float64, device=DEVICE) for _ in range(3))
    var = torch.rand(3, dtype=torch.float64, device=DEVICE) + 0.5
    return (x, weight, bias, residual), (mean, var)


def fused(stats, act, training):
    def run(x, weight, bias, residual):
        mean, var = (s.clone() for s in stats)
        return batch_norm_act(
            x, mean, var, weight, bias, residual=residual, act=act, training=training
        )

    return run


def formula(stats, act, training):
    """In torch's elementary operations: the third derivative of its own batch norm is wrong."""

    def run(x, weight, bias, residual):
        mean, var = stats
        if training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        mean, var, weight, bias = (v.view(1, -1, 1, 1) for v in (mean, var, weight, bias))
        z = (x - mean) / (var + 1e-5).sqrt() * weight + bias + residual
        return ACTIVATION_FORMULAS[act or "identity"](z, 0.0)

    return run


@pytest.mark.parametrize("act", [None, "relu", "silu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forward_mode(act, training):
    primals, stats = inputs()
    tangents = tuple(torch.randn_like(p) for p in primals)
    _, tangent = torch.func.jvp(fused(stats, act, training), primals, tangents)
    _, expected = torch.func.jvp(formula(stats, act, training), primals, tangents)
    assert_close(tangent, expected, torch.float64)


@pytest.mark.parametrize("act", [None, "relu", "silu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_loss_whose_gradient_depends_on_the_output(act, training):
    (x, *others), stats = inputs()
    x.requires_grad_()
    found = []
    for make in (fused, formula):
        loss = make(stats, act, training)(x, *others).square().sum()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
        third = torch.autograd.grad(second.square().sum(), x)[0]
        found.append((first, second, third))
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected, torch.float64)


def test_forward_over_reverse():
    (x, *others), stats = inputs()
    direction = torch.randn_like(x)
    products = []
    for make in (fused, formula):
        run = make(stats, "relu", True)
        gradient = torch.func.grad(lambda x, run=run: run(x, *others).square().sum())
        products.append(torch.func.jvp(gradient, (x,), (direction,))[1])
    assert_close(products[0], products[1], torch.float64)


def test_tensor_that_left_a_transform():
    """What leaks out of torch.func is unwrapped, with gradients recorded and without."""
    (x, *others), stats = inputs()
    leaked = []
    torch.func.grad(lambda x: (leaked.append(x), x.sum())[1])(x)
    run = fused(stats, "relu", True)
    expected = run(x, *others)
    assert torch.equal(run(leaked[0], *others), expected)
    with torch.no_grad():
        assert torch.equal(run(leaked[0], *others), expected)


def test_tangents_outside_of_grad_mode():
    """Of the output inside no_grad, and of a gradient that no graph is made of."""
    (x, *others), stats = inputs()
    direction = torch.randn_like(x)
    found = []
    for make in (fused, formula):
        run = make(stats, "relu", True)
        with forward_ad.dual_level():
            with torch.no_grad():
                y = run(forward_ad.make_dual(x, direction), *others)
            leaf = x.clone().requires_grad_()
            loss = run(forward_ad.make_dual(leaf, direction), *others).square().sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
            found.append([forward_ad.unpack_dual(t).tangent for t in (y, gradient)])
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected, torch.float64)


def pooled(x, weight, bias):
    return batch_norm_act_max_pool2d(x, None, None, weight, bias, kernel_size=2, training=True)


def summed(x, weight, bias):
    none = (None, None)
    return dual_batch_norm_act(x, *none, weight, bias, x.square(), *none, bias, None, training=True)


@pytest.mark.parametrize("run", [pooled, summed])
def test_tangents_of_a_dual_level_are_those_of_jvp(run):
    """Of the output, and of the gradient."""
    (*primals, _), _ = inputs()
    tangents = [torch.randn_like(p) for p in primals]
    primals[0].requires_grad_()

    def gradient(*primals):
        return torch.autograd.grad(run(*primals).square().sum(), primals[0])[0]

    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)]
        found = [forward_ad.unpack_dual(f(*duals)).tangent for f in (run, gradient)]
    of_x = torch.func.grad(lambda *primals: run(*primals).square().sum())
    expected = [torch.func.jvp(f, tuple(primals), tuple(tangents))[1] for f in (run, of_x)]
    for actual, other in zip(found, expected, strict=True):
        assert_close(actual, other, torch.float64)
