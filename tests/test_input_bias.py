"""Tests ``input_bias``: the batch norm adds the bias of the convolution that precedes it."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import bnres
from bnres.functional import (
    BatchNormState,
    batch_norm_act,
    batch_norm_act_max_pool2d,
    conv2d_batch_norm_act,
)
from bnres.nn import BatchNorm1d, BatchNormActMaxPool2d, ConvBatchNormAct2d
from bnres.nn.state import next_state
from tests.device import DEVICE
from tests.tolerances import assert_close

ROUTES = {"kernels": nullcontext, "aten": lambda: bnres.use_backend("aten")}
# The number of training steps, small for the kernels because their interpreter is slow.
STEPS = {"kernels": 4, "aten": 30}
route = pytest.mark.parametrize("route", ROUTES)
training_or_not = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def state(conv, bn):
    """Returns a fused call's named arguments: the state of ``bn``, and the bias of ``conv``."""
    return next_state(bn)._replace(input_bias=conv.bias)._asdict()


class Net(nn.Module):
    """A model of convolutions with biases of about 5, and batch norms."""

    def __init__(self, momentum=0.1):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.bn, self.other_bn = (nn.BatchNorm2d(4, momentum=momentum) for _ in "ab")
        self.pool = nn.MaxPool2d(3, 2, 1)
        for conv in (self.conv, self.other):
            nn.init.uniform_(conv.bias, 4, 6)


class OneNorm(Net):
    def forward(self, x):
        return self.bn(self.conv(x)).relu()

    def fused(self, x):
        return batch_norm_act(
            F.conv2d(x, self.conv.weight), training=self.training, **state(self.conv, self.bn)
        )


class TwoNorms(Net):
    def forward(self, x):
        return (self.bn(self.conv(x)) + self.other_bn(self.other(x))).relu()

    def fused(self, x):
        residual_norm = BatchNormState(**state(self.other, self.other_bn))
        return batch_norm_act(
            F.conv2d(x, self.conv.weight), residual=F.conv2d(x, self.other.weight),
            residual_norm=residual_norm, training=self.training, **state(self.conv, self.bn),
        )  # fmt: skip


class Pooled(Net):
    def forward(self, x):
        return self.pool(self.bn(self.conv(x)).relu())

    def fused(self, x):
        return batch_norm_act_max_pool2d(
            F.conv2d(x, self.conv.weight), kernel_size=3, stride=2, padding=1,
            training=self.training, **state(self.conv, self.bn),
        )  # fmt: skip


NETS = (OneNorm, TwoNorms, Pooled)


def pair(make, **options):
    """Returns two equal nets: the first has the fused forward, the second the stock forward."""
    torch.manual_seed(0)
    stock = make(**options).to(DEVICE)
    ours = copy.deepcopy(stock)
    ours.forward = ours.fused
    return ours, stock


def assert_same_buffers(ours, stock):
    for actual, expected in zip(ours.buffers(), stock.buffers(), strict=True):
        assert_close(actual, expected, torch.float32)


@route
@pytest.mark.parametrize(
    ("make", "momentum"), [*((make, 0.1) for make in NETS), (OneNorm, None)], ids=str
)
def test_checkpointed_statistics(make, momentum, route):
    """torch ends the recomputation of a checkpoint at the last tensor that forward saved.

    By then, the recomputation must have updated the statistics of all norms.
    """
    ours, stock = pair(make, momentum=momentum)
    with ROUTES[route]():
        for _ in range(STEPS[route]):
            x = torch.randn(2, 3, 4, 4, device=DEVICE)
            for net in (ours, stock):
                checkpoint(net, x, use_reentrant=False).sum().backward()
    assert_same_buffers(ours, stock)
    assert ours.bn.num_batches_tracked == 2 * STEPS[route]


@route
def test_checkpointed_sequence(route):
    torch.manual_seed(0)
    ours = nn.Sequential(*(ConvBatchNormAct2d(3, 3, 1, bias=True) for _ in range(4))).to(DEVICE)
    for layer in ours:
        nn.init.uniform_(layer.conv.bias, 4, 6)
    stock = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(4))
    ).to(DEVICE)
    values = [v.clone() for v in ours.state_dict().values()]
    stock.load_state_dict(dict(zip(stock.state_dict(), values, strict=True)))
    x = torch.randn(2, 3, 4, 4, device=DEVICE)
    with ROUTES[route]():
        for _ in range(STEPS[route]):
            for net in (ours, stock):
                checkpoint_sequential(net, 2, x, use_reentrant=False).sum().backward()
    assert_same_buffers(ours, stock)


@route
@training_or_not
@pytest.mark.parametrize("make", NETS)
def test_compiled(make, training, route):
    ours, _ = pair(make)
    x = torch.randn(2, 3, 4, 4, device=DEVICE)
    found = []
    with ROUTES[route]():
        for compiles in (True, False):
            net = copy.deepcopy(ours).train(training)
            net.forward = net.fused
            run = torch.compile(net, backend="aot_eager", fullgraph=True) if compiles else net
            y = run(x)
            y.square().sum().backward()
            gradients = [p.grad for p in net.parameters() if p.grad is not None]
            found.append([y, *gradients, *net.buffers()])
    if route == "aten" and training and DEVICE == "cuda":
        # torch runs different batch norms in compiled and eager calls, which round differently.
        for compiled, eager in zip(*found, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    else:
        assert all(map(torch.equal, *found))


@route
@pytest.mark.parametrize("momentum", [0.3, torch.tensor(0.3, dtype=torch.float64)], ids=str)
def test_each_call_of_a_norm_updates_once(momentum, route):
    torch.manual_seed(0)
    a, b = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64, device=DEVICE)
    biases = torch.randn(2, 3, dtype=torch.float64, device=DEVICE) * 5
    momentum = momentum.to(DEVICE) if isinstance(momentum, torch.Tensor) else momentum
    mean, var = torch.zeros(3, device=DEVICE).double(), torch.ones(3, device=DEVICE).double()
    wide_mean, wide_var = mean.clone(), var.clone()
    with ROUTES[route]():
        for x, bias in zip((a, b), biases, strict=True):
            batch_norm_act(x, mean, var, input_bias=bias, training=True, momentum=momentum)
            F.batch_norm(x + bias.view(3, 1, 1), wide_mean, wide_var, None, None, True, 0.3)
    assert_close(mean, wide_mean, torch.float64)
    assert_close(var, wide_var, torch.float64)


def draw():
    """Returns six tensors that require gradients, and running statistics (mean, var).

    The six tensors are x, residual, weight, bias, and the input biases of two norms.
    """
    torch.manual_seed(3)
    x, residual = torch.randn(2, 3, 2, 2, 8, device=DEVICE, dtype=torch.float64)
    channel = torch.randn(4, 2, dtype=torch.float64, device=DEVICE).unbind()
    mean, var = torch.randn(2, device=DEVICE).double(), torch.rand(2, device=DEVICE).double() + 0.5
    return [t.clone().requires_grad_() for t in (x, residual, *channel)], (mean, var)


def single(x, residual, weight, bias, input_bias, other_bias, stats, training, **options):
    return batch_norm_act(
        x, *stats, weight, bias, input_bias=input_bias, residual=residual, training=training,
        **options,
    )  # fmt: skip


def double(x, residual, weight, bias, input_bias, other_bias, stats, training, **options):
    other = [None if s is None else s.clone() for s in stats]
    norm = BatchNormState(*other, bias, weight, input_bias=other_bias)
    return single(
        x, residual, weight, bias, input_bias, None, stats, training, residual_norm=norm, **options
    )


def normalized(x, input_bias, weight, bias, stats, training):
    """Returns the batch norm of x + input_bias, computed by elementary torch operations."""
    x = x + input_bias.view(-1, 1, 1)
    mean, var = stats
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    mean, var, weight, bias = (v.view(-1, 1, 1) for v in (mean, var, weight, bias))
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def act(z, name):
    return F.silu(z) if name == "silu" else F.relu(z)


def single_formula(x, residual, weight, bias, a, b, stats, training, name):
    return act(normalized(x, a, weight, bias, stats, training) + residual, name)


def double_formula(x, residual, weight, bias, a, b, stats, training, name):
    other = normalized(residual, b, bias, weight, stats, training)
    return single_formula(x, other, weight, bias, a, None, stats, training, name)


def pooled(in_fp32, **window):
    """Returns the pooled operation and its formula. With ``in_fp32`` the operation runs in fp32."""

    def operation(x, residual, weight, bias, input_bias, other_bias, stats, training, **options):
        return batch_norm_act_max_pool2d(
            x.float() if in_fp32 else x, *stats, weight, bias, input_bias=input_bias,
            training=training, **window, **options,
        )  # fmt: skip

    def formula(x, residual, weight, bias, a, b, stats, training, name):
        return F.max_pool2d(act(normalized(x, a, weight, bias, stats, training), name), **window)

    return operation, formula


OPERATIONS = {
    "single": (single, single_formula),
    "two norms": (double, double_formula),
    # The kernel supports this window, but does not support fp64.
    "pooled": pooled(True, kernel_size=3, stride=2, padding=1),
    # The kernel does not support this window, so `batch_norm_act` and torch's pooling run.
    "pooled by torch": pooled(False, kernel_size=2, stride=1, padding=1, dilation=2),
}
DTYPES = dict.fromkeys(OPERATIONS, torch.float64) | {"pooled": torch.float32}
operation = pytest.mark.parametrize("operation", OPERATIONS)


@route
@training_or_not
@operation
@pytest.mark.parametrize("name", ["relu", "silu"])
def test_values_and_gradients(operation, name, training, route):
    ours, formula = OPERATIONS[operation]
    inputs, stats = draw()
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        if dtype == torch.float32:
            buffers = [s.float() for s in stats]
            with ROUTES[route]():
                y = ours(*leaves, buffers, training, act=name)
        else:
            y = formula(*leaves, stats, training, name)
        dy = torch.linspace(-1, 1, y.numel(), device=DEVICE).view(y.shape).to(dtype)
        gradients = torch.autograd.grad(y, leaves, dy, allow_unused=True)
        found.append([y, *(g for g in gradients if g is not None)])
        if dtype == torch.float32 and training and route == "kernels":
            assert not gradients[4].any()
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected, torch.float32)
    if training:
        mean, var = (s.clone() for s in stats)
        x, input_bias = inputs[0].detach(), inputs[4].detach()
        F.batch_norm(x + input_bias.view(2, 1, 1), mean, var, None, None, True)
        assert_close(buffers[0], mean, torch.float32)
        assert_close(buffers[1], var, torch.float32)


@training_or_not
@operation
def test_only_the_bias_needs_a_gradient(operation, training):
    ours, formula = OPERATIONS[operation]
    inputs, stats = draw()
    *given, input_bias, other = [t.detach() for t in inputs]
    wanted = (input_bias, other) if operation == "two norms" else (input_bias,)
    for t in wanted:
        t.requires_grad_()
    arguments = (*given, input_bias, other)
    y = ours(*arguments, [s.clone() for s in stats], training, act="silu")
    expected = formula(*arguments, stats, training, "silu")
    found = (torch.autograd.grad(t.square().sum(), wanted) for t in (y, expected))
    for actual, theirs in zip(*found, strict=True):
        assert_close(actual, theirs, DTYPES[operation])


@training_or_not
@pytest.mark.parametrize("operation", ["single", pytest.param("two norms", marks=pytest.mark.slow)])
def test_gradients_of_gradients(operation, training):
    ours, _ = OPERATIONS[operation]
    inputs, stats = draw()
    stats = (None, None) if training else [s[:1] for s in stats]
    x, residual = (t[:, :1, :1, :1] for t in inputs[:2])

    def run(*inputs):
        return ours(*inputs, stats, training, act="silu")

    inputs = [t.detach() for t in (x, residual, *(t[:1] for t in inputs[2:]))]
    for i in (0, 2, 4, 5):  # all inputs except the residual and the batch norm's bias
        inputs[i].requires_grad_()
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@training_or_not
@operation
@pytest.mark.parametrize("transform", ["jvp", "jacrev", "jacfwd", "dual"])
def test_transforms(operation, transform, training):
    inputs, stats = draw()
    primals = [t.detach() for t in inputs]
    tangents = [torch.randn_like(p) for p in primals]
    used = range(6) if operation == "two norms" else range(5)
    found = []
    for i, function in enumerate(OPERATIONS[operation]):

        def run(*inputs, i=i, function=function):
            if i:
                return function(*inputs, stats, training, "silu")
            return function(*inputs, [s.clone() for s in stats], training, act="silu")

        if transform == "jvp":
            found.append(torch.func.jvp(run, tuple(primals), tuple(tangents)))
        elif transform == "dual":
            with forward_ad.dual_level():
                y = run(*map(forward_ad.make_dual, primals, tangents))
                found.append(forward_ad.unpack_dual(y))
        else:
            derivative = getattr(torch.func, transform)
            argnums = tuple(i for i in used if operation != "pooled" or i != 1)
            found.append(derivative(run, argnums)(*primals))
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected, DTYPES[operation])


@route
@training_or_not
def test_without_gradients(training, route):
    """In evaluation the kernels subtract the bias from the running mean. They don't add it to x."""
    for operation, (ours, formula) in OPERATIONS.items():
        inputs, stats = draw()
        given, buffers = (
            [t.to(DTYPES[operation], copy=True) for t in ts] for ts in (inputs, stats)
        )
        with torch.no_grad(), ROUTES[route]():
            y = ours(*given, buffers, training, act="relu")
            assert_close(y, formula(*inputs, stats, training, "relu"), DTYPES[operation])


@training_or_not
def test_recomputed(training):
    inputs, stats = draw()
    found = []
    for context in (nullcontext, bnres.recompute):
        with context():
            y = single(*inputs, [s.clone() for s in stats], training)
            loss = (y * y).sum()  # saves y for backward
        found.append(torch.autograd.grad(loss, inputs[:5]))
    assert all(map(torch.equal, *found))


@route
@training_or_not
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype, training, route):
    """The bias is fp32, and the convolution's output is fp16 or bf16."""
    torch.manual_seed(0)
    ours = ConvBatchNormAct2d(4, 4, 1, bias=True).to(DEVICE).train(training)
    conv, bn = ours.conv, ours.bn
    x = torch.randn(3, 4, 4, 4, device=DEVICE)
    wide = F.conv2d(*(t.to(dtype).double() for t in (x, conv.weight, conv.bias)))
    mean, var = bn.running_mean.double(), bn.running_var.double()
    expected = F.relu(F.batch_norm(wide, mean, var, training=training))
    with torch.autocast(DEVICE, dtype), ROUTES[route]():
        y = ours(x)
    assert y.dtype == dtype
    assert_close(y, expected, dtype)
    assert_close(bn.running_mean, mean, dtype)
    y.float().sum().backward()
    assert conv.bias.grad.dtype == torch.float32


@route
def test_errors(route):
    x = torch.randn(2, 3, 4, 4, device=DEVICE)
    mean, var = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    with ROUTES[route]():
        for operation in (batch_norm_act, batch_norm_act_max_pool2d):
            options = {"kernel_size": 2} if operation is batch_norm_act_max_pool2d else {}
            with pytest.raises(RuntimeError, match="input_bias should contain 3 elements not 4"):
                operation(x, mean, var, input_bias=torch.ones(4, device=DEVICE), **options)
            with pytest.raises(TypeError, match="input_bias must be of a floating dtype, got"):
                operation(x, mean, var, input_bias=torch.ones(3).long().to(DEVICE), **options)
        state = BatchNormState(mean, var, input_bias=torch.ones(4, device=DEVICE))
        with pytest.raises(RuntimeError, match="residual_input_bias should contain 3 elements"):
            batch_norm_act(x, mean, var, residual=x, residual_norm=state)


@route
@training_or_not
def test_input_of_a_wrong_number_of_dimensions(training, route):
    """The error messages are the same as those of torch's modules."""
    layers = [
        ConvBatchNormAct2d(3, 3, 1, bias=True),
        ConvBatchNormAct2d(3, 3, 1, padding_mode="circular"),
        BatchNormActMaxPool2d(3),
    ]
    x = torch.randn(3, 4, 4, device=DEVICE)
    with ROUTES[route]():
        for layer in layers:
            with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
                layer.to(DEVICE).train(training)(x)
            assert not any(int(n) for k, n in layer.state_dict().items() if "tracked" in k)
        with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
            conv2d_batch_norm_act(x, torch.ones(3, 3, 1, 1, device=DEVICE), None, None, None)
        bn, residual_norm = ConvBatchNormAct2d(3, 3, 1).bn.to(DEVICE), BatchNorm1d(3).to(DEVICE)
        with pytest.raises(ValueError, match=r"expected 2D or 3D input \(got 4D input\)"):
            bn(x[None], x[None], residual_norm=residual_norm)
        assert bn.num_batches_tracked == residual_norm.num_batches_tracked == 0
