"""Tests first, second, third and forward-mode derivatives of the fused operations."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bnres import nn
from bnres.functional import BatchNormState, batch_norm_act, batch_norm_act_max_pool2d
from bnres.kernels.reference import ACTIVATION_FORMULAS
from tests.device import DEVICE
from tests.tolerances import assert_close


def inputs(shape=(4, 3, 2, 2)):
    """Returns (x, weight, bias, residual) and (mean, var)."""
    torch.manual_seed(4)
    x, residual = torch.randn(2, *shape, dtype=torch.float64, device=DEVICE)
    weight, bias, mean = torch.randn(3, shape[1], dtype=torch.float64, device=DEVICE)
    var = torch.rand(shape[1], dtype=torch.float64, device=DEVICE) + 0.5
    return (x, weight, bias, residual), (mean, var)


@pytest.mark.parametrize("act", [pytest.param(None, marks=pytest.mark.slow), "relu", "silu"])
@pytest.mark.parametrize(
    "has_residual", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "residual"]
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_of_gradients(act, has_residual, training):
    given, stats = inputs((3, 1, 1, 1))
    given = [t.requires_grad_() for t in given[: 3 + has_residual]]
    stats = (None, None) if training else stats

    def run(x, weight, bias, residual=None):
        return batch_norm_act(
            x, *stats, weight, bias, residual=residual, act=act, training=training
        )

    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        pytest.param(nn.BatchNorm1d, (3, 2), marks=pytest.mark.slow),
        pytest.param(nn.BatchNorm2d, (3, 2, 1, 1), marks=pytest.mark.slow),
        pytest.param(nn.BatchNorm3d, (3, 2, 1, 1, 1), marks=pytest.mark.slow),
        pytest.param(nn.BatchNormAct1d, (3, 2), marks=pytest.mark.slow),
        (nn.BatchNormAct2d, (3, 2, 1, 1)),
        pytest.param(nn.BatchNormAct3d, (3, 2, 1, 1, 1), marks=pytest.mark.slow),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else "",
)
def test_gradients_of_modules(module, shape):
    torch.manual_seed(5)
    bn = module(2, track_running_stats=False, dtype=torch.float64, device=DEVICE)
    x = torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(bn, x)
    assert torch.autograd.gradgradcheck(bn, x)


def fused(stats, act, training):
    def run(x, weight, bias, residual):
        mean, var = (s.clone() for s in stats)
        return batch_norm_act(
            x, mean, var, weight, bias, residual=residual, act=act, training=training
        )

    return run


def normalized(x, weight, bias, stats=None):
    """Returns the batch norm of x, computed by elementary torch operations.

    `torch.nn.functional.batch_norm` is not used, because its third derivative is wrong.
    """
    mean, var = stats or (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0))
    mean, var, weight, bias = (v.view(-1, 1, 1) for v in (mean, var, weight, bias))
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def formula(stats, act, training):
    def run(x, weight, bias, residual):
        z = normalized(x, weight, bias, None if training else stats) + residual
        return ACTIVATION_FORMULAS[act or "identity"](z, 0.0)

    return run


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


def test_tensor_returned_out_of_a_transform():
    """The wrapper of x that torch.func.grad passes to its function can be used afterwards."""
    (x, *others), stats = inputs()
    leaked = []
    torch.func.grad(lambda x: (leaked.append(x), x.sum())[1])(x)
    run = fused(stats, "relu", True)
    expected = run(x, *others)
    assert torch.equal(run(leaked[0], *others), expected)
    with torch.no_grad():
        assert torch.equal(run(leaked[0], *others), expected)


def test_tangents_outside_of_grad_mode():
    """An output under no_grad has a tangent. So has a gradient computed without create_graph."""
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
    """Runs the pooled operation in fp32, because its kernel does not support fp64."""
    return batch_norm_act_max_pool2d(
        x.float(), None, None, weight, bias, kernel_size=3, stride=2, padding=1,
        training=True,
    )  # fmt: skip


def summed(x, weight, bias):
    state = BatchNormState(None, None, bias)
    return batch_norm_act(
        x, None, None, weight, bias, residual=x.square(), residual_norm=state, training=True
    )


@pytest.mark.parametrize("run", [pooled, summed])
def test_tangents_of_a_dual_level_are_those_of_jvp(run):
    """The output and the gradient of the input have the tangents of torch.func.jvp."""
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


def added(x, weight, bias):
    return batch_norm_act(x, None, None, weight, bias, residual=x.sin(), act="silu", training=True)


# Pairs of an operation and its formula in elementary torch operations.
OPERATIONS = {
    "added": (added, lambda x, w, b: torch.nn.functional.silu(normalized(x, w, b) + x.sin())),
    "two norms": (
        summed,
        lambda x, w, b: (normalized(x, w, b) + normalized(x.square(), b, b * 0)).relu(),
    ),
    "pooled": (
        pooled,
        lambda x, w, b: torch.nn.functional.max_pool2d(normalized(x, w, b).relu(), 3, 2, 1),
    ),
}


def mapped_pullback(run, inputs):
    y, pullback = torch.func.vjp(run, *inputs)
    generator = torch.Generator(device=DEVICE).manual_seed(7)
    dys = torch.randn(3, *y.shape, device=DEVICE, generator=generator)
    return torch.func.vmap(pullback)(dys.to(y.dtype))


def linearized(run, inputs):
    y, tangent = torch.func.linearize(run, *inputs)
    return y, tangent(*(t * 2 for t in inputs))


BY_ALL = (0, 1, 2)
TRANSFORMS = {
    "jacrev": lambda run, inputs: torch.func.jacrev(run, BY_ALL)(*inputs),
    "jacfwd": lambda run, inputs: torch.func.jacfwd(run, BY_ALL)(*inputs),
    "hessian": lambda run, inputs: torch.func.hessian(
        lambda *a: run(*a).sin().sum(), (0, 1)
    )(*inputs),
    "vmap of vjp": mapped_pullback,
    "linearize": linearized,
}  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_transforms_of_torch_func(operation, transform):
    torch.manual_seed(6)
    x = torch.randn(3, 2, 2, 8, dtype=torch.float64, device=DEVICE)
    weight, bias = torch.randn(2, 2, dtype=torch.float64, device=DEVICE)
    dtype = torch.float32 if operation == "pooled" else torch.float64
    found = [TRANSFORMS[transform](run, (x, weight, bias)) for run in OPERATIONS[operation]]
    for actual, expected in zip(*map(tree_leaves, found), strict=True):
        assert_close(actual, expected, dtype)


@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "vmap of vjp"])
def test_transforms_update_statistics_once(transform):
    """A transform updates the running statistics once, as with torch's batch norm.

    `torch.func.linearize` is not tested, because it calls its function twice and updates twice.
    """
    x = inputs()[0][0]
    weight, bias = torch.ones(2, 3, dtype=torch.float64, device=DEVICE)
    mean, var = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    counter = torch.tensor(0, device=DEVICE)

    def run(x, weight, bias):
        return batch_norm_act(
            x, mean, var, weight, bias, training=True, num_batches_tracked=counter
        )

    TRANSFORMS[transform](run, (x, weight, bias))
    assert counter == 1
    assert_close(mean, 0.1 * x.mean((0, 2, 3)), torch.float32)
    assert_close(var, 0.9 + 0.1 * x.var((0, 2, 3)), torch.float32)


def test_forward_mode_under_vmap():
    """Each mapped batch gets its tangents. Statistics that are not mapped raise an error."""
    torch.manual_seed(8)
    x = torch.randn(4, 3, 2, 2, 2, dtype=torch.float64, device=DEVICE)
    weight, bias = torch.randn(2, 2, dtype=torch.float64, device=DEVICE)

    def tangent(run):
        return torch.func.vmap(lambda x: torch.func.jvp(lambda x: run(x, weight, bias), (x,), (x,)))

    ours, theirs = OPERATIONS["added"]
    for actual, expected in zip(tangent(ours)(x), tangent(theirs)(x), strict=True):
        assert_close(actual, expected, torch.float64)
    mean, var = torch.zeros(2, device=DEVICE), torch.ones(2, device=DEVICE)
    with pytest.raises(RuntimeError, match="which will be updated in place, were not batched"):
        tangent(lambda x, *_: batch_norm_act(x, mean, var, training=True))(x)
    assert mean.abs().max() == 0


def test_dispatch_modes_see_the_kernels_of_backward():
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(op._opname)
            return op(*args, **(kwargs or {}))

    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 2, device=DEVICE, requires_grad=True)
    y = batch_norm_act(x, None, None, training=True)
    dy = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    with Record():
        (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, expected)
    assert [name for name in seen if name != "detach"] == ["batch_norm_act_backward"]


@pytest.mark.parametrize("create_graph", [False, True])
def test_batched_gradients(create_graph):
    torch.manual_seed(0)
    x, residual = (torch.randn(3, 4, 5, 2, device=DEVICE, requires_grad=True) for _ in "ab")
    y, fork = batch_norm_act(x, None, None, residual=residual, training=True, fork=True)
    dy, dy_skip = torch.randn(2, 2, *x.shape, device=DEVICE)
    inputs = (x, residual)
    found = torch.autograd.grad(
        (y, fork), inputs, (dy, dy_skip), True, create_graph, is_grads_batched=True
    )
    for i in range(2):
        expected = torch.autograd.grad((y, fork), inputs, (dy[i], dy_skip[i]), True)
        for batch, single in zip(found, expected, strict=True):
            torch.testing.assert_close(batch[i], single, rtol=1e-5, atol=1e-5)
