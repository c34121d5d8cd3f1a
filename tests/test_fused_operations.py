"""Compares sums of two batch norms, pooled batch norm and forked outputs with torch's layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnres.functional import BatchNormState, batch_norm_act, batch_norm_act_max_pool2d
from bnres.kernels.bn_max_pool import bn_max_pool_backward_dx
from bnres.kernels.norm import Norm, Statistics
from bnres.kernels.reference import ACTIVATION_FORMULAS
from bnres.nn import BatchNorm1d, BatchNormAct1d, BatchNormAct2d, BatchNormActMaxPool2d
from tests.device import DEVICE
from tests.tolerances import assert_close, formula_dtype

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def draw(shape, dtype, layout, seed=0):
    torch.manual_seed(seed)
    x = (torch.randn(shape, device=DEVICE) * 2 + 0.5).to(dtype)
    return x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()


def norm(channels, dtype, training):
    torch.manual_seed(9)
    bn = nn.BatchNorm2d(channels, device=DEVICE)
    nn.init.uniform_(bn.weight, -1, 1.5)
    nn.init.normal_(bn.bias)
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    return (bn.double() if dtype == torch.float64 else bn).train(training)


def fused_twin(bn, cls=BatchNormAct2d, **options):
    twin = cls(bn.num_features, device=DEVICE, **options)
    twin = twin.double() if bn.weight.dtype == torch.float64 else twin
    twin.load_state_dict(bn.state_dict())
    return twin.train(bn.training)


def assert_steps_agree(ours, theirs, inputs, norms, wide_norms, dtype, of_outputs=None):
    """Compares outputs, buffers and gradients of inputs and parameters with fp64 references.

    The tolerance is that of ``dtype``. For the outputs, ``of_outputs`` may name another dtype.
    """
    wide = [x.detach().double().requires_grad_() for x in inputs]
    y, expected = ours(*inputs), theirs(*wide)
    assert y.dtype == dtype
    assert_close(y, expected, of_outputs or dtype)
    torch.manual_seed(5)
    dy = torch.randn_like(expected).to(dtype)
    y.backward(dy)
    expected.backward(dy.double())
    for x, w in zip(inputs, wide, strict=True):
        assert_close(x.grad, w.grad, dtype)
    for bn, wide_bn in zip(norms, wide_norms, strict=True):
        for p, q in zip(bn.parameters(), wide_bn.parameters(), strict=True):
            assert_close(p.grad, q.grad, dtype)
        for b, c in zip(bn.buffers(), wide_bn.buffers(), strict=True):
            assert_close(b, c, torch.float32 if dtype != torch.float64 else dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_two_norms(dtype, layout, training):
    shape = (3, 11, 5, 4)
    inputs = [draw(shape, dtype, layout, seed) for seed in (0, 1)]
    stock = [norm(11, dtype, training), norm(11, dtype, training)]
    wide = [copy.deepcopy(bn).double() for bn in stock]
    main, other = fused_twin(stock[0]), fused_twin(stock[1], apply_act=False)

    assert_steps_agree(
        lambda a, b: main(a, b, residual_norm=other),
        lambda a, b: F.relu(wide[0](a) + wide[1](b)), inputs, (main, other), wide, dtype,
    )  # fmt: skip


@pytest.mark.parametrize("act", ACTIVATION_FORMULAS)
def test_two_norms_with_every_activation(act):
    inputs = [draw((2, 3, 3, 2), torch.float64, "contiguous", seed) for seed in (0, 1)]
    stock = [norm(3, torch.float64, True), norm(3, torch.float64, True)]
    main, other = fused_twin(stock[0], act_layer=act), fused_twin(stock[1], apply_act=False)

    assert_steps_agree(
        lambda a, b: main(a, b, residual_norm=other),
        lambda a, b: ACTIVATION_FORMULAS[act](stock[0](a) + stock[1](b), 0.01), inputs,
        (main, other), stock, torch.float64, formula_dtype(act),
    )  # fmt: skip


def test_two_norms_with_one_norm_frozen():
    inputs = [draw((3, 4, 3, 2), torch.float64, "channels_last", seed) for seed in (0, 1)]
    stock = [norm(4, torch.float64, True), norm(4, torch.float64, False)]
    main, other = fused_twin(stock[0]), fused_twin(stock[1], apply_act=False)
    assert_steps_agree(
        lambda a, b: main(a, b, residual_norm=other),
        lambda a, b: F.relu(stock[0](a) + stock[1](b)), inputs, (main, other), stock,
        torch.float64,
    )  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_each_norm_of_two_has_its_own_eps(training):
    x, r = (torch.randn(5, 3, 2, 2, dtype=torch.float64, device=DEVICE) for _ in range(2))
    stock = [norm(3, torch.float64, training), norm(3, torch.float64, training)]
    stock[0].eps, stock[1].eps = 0.3, 2.0
    main, other = (fused_twin(bn, eps=bn.eps) for bn in stock)
    expected = F.relu(stock[0](x) + stock[1](r))
    assert_close(main(x, r, residual_norm=other), expected, torch.float64)
    with torch.no_grad():  # so that in evaluation the kernels read running_var and eps
        main, other = (fused_twin(bn, eps=bn.eps) for bn in stock)
        assert_close(main(x, r, residual_norm=other), expected, torch.float64)


def test_two_norms_in_one_dimension_and_without_parameters():
    x, r = (torch.randn(5, 3, 4, dtype=torch.float64, device=DEVICE) for _ in range(2))
    ours = BatchNormAct1d(3, affine=False, device=DEVICE).double()
    other = BatchNorm1d(3, affine=False, momentum=None, device=DEVICE).double()
    a, b = (
        nn.BatchNorm1d(3, affine=False, momentum=m, device=DEVICE).double() for m in (0.1, None)
    )
    for _ in range(2):
        assert_close(ours(x, r, residual_norm=other), F.relu(a(x) + b(r)), torch.float64)
    assert_close(other.running_var, b.running_var, torch.float64)


# Each case has kernel, stride, padding, dilation, ceil_mode, and the shape of x.
POOLINGS = [
    (3, 2, 1, 1, False, (2, 9, 7, 8)),
    (2, None, 0, 1, True, (2, 8, 5, 7)),
    ((3, 2), (1, 3), (1, 0), (1, 2), True, (2, 3, 8, 11)),
]


@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pooled(pooling, layout):
    kernel, stride, padding, dilation, ceil, shape = pooling
    windows = (kernel, stride, padding, dilation, ceil)
    for dtype in (torch.float64, torch.float32):
        stock = norm(shape[1], dtype, True)
        wide = copy.deepcopy(stock).double()
        ours = fused_twin(
            stock, BatchNormActMaxPool2d, kernel_size=kernel, stride=stride, padding=padding,
            dilation=dilation, ceil_mode=ceil,
        )  # fmt: skip
        assert_steps_agree(
            ours, lambda x, wide=wide: F.max_pool2d(F.relu(wide(x)), *windows),
            [draw(shape, dtype, layout)], [ours], [wide], dtype,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pooled_values_are_compared_as_rounded(dtype, layout):
    """The outputs are bit-equal to those of separate layers, also for ties and for NaN.

    The gradients are 0 at the same elements.
    """
    x = draw((2, 16, 9, 16), dtype, layout).detach()
    x[0, 3, 4, 4] = float("nan")
    x[1, 5] = 1.5
    bn = fused_twin(norm(16, dtype, False))
    pooled = fused_twin(bn, BatchNormActMaxPool2d, kernel_size=3, stride=2, padding=1)
    x.requires_grad_()
    y = bn(x)
    expected = F.max_pool2d(y, 3, 2, 1)
    actual = pooled(x)
    assert torch.equal(actual.nan_to_num(-1), expected.nan_to_num(-1))
    dy = torch.ones_like(expected)
    (theirs,) = torch.autograd.grad(expected, x, dy)
    (ours,) = torch.autograd.grad(actual, x, dy)
    assert torch.equal(ours.nan_to_num(-1) != 0, theirs.nan_to_num(-1) != 0)
    assert_close(ours.nan_to_num(0), theirs.nan_to_num(0), dtype)
    assert actual.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("act", [pytest.param(None, marks=pytest.mark.slow), "relu", "silu"])
@pytest.mark.parametrize(
    "has_residual", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "residual"]
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forked(act, has_residual, training):
    stock = norm(5, torch.float64, training)
    inputs = [draw((3, 5, 3, 2), torch.float64, "contiguous", s) for s in range(1 + has_residual)]
    ours = fused_twin(stock, act_layer=act)

    def consume(y, skip):
        return y.sin() + skip * 3

    def theirs(x, residual=None):
        y = stock(x) if residual is None else stock(x) + residual
        y = ACTIVATION_FORMULAS[act or "identity"](y, 0.0)
        return consume(y, y)

    assert_steps_agree(
        lambda *a: consume(*ours(*a, fork=True)), theirs, inputs, [ours], [stock], torch.float64
    )
    y, skip = ours(*inputs, fork=True)
    assert y.data_ptr() == skip.data_ptr()
    (one,) = torch.autograd.grad(skip.sum(), inputs[0])  # only one of the outputs is used
    (other,) = torch.autograd.grad(ours(*inputs).sum(), inputs[0])
    assert_close(one, other, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forked_in_every_type_and_layout(dtype, layout):
    stock = norm(11, dtype, True)
    wide = copy.deepcopy(stock).double()
    inputs = [draw((3, 11, 5, 4), dtype, layout, seed) for seed in (0, 1)]
    ours = fused_twin(stock)

    def theirs(x, residual):
        y = F.relu(wide(x) + residual)
        return y + y

    assert_steps_agree(lambda *a: sum(ours(*a, fork=True)), theirs, inputs, [ours], [wide], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "mode", ["train", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("eval", "fixed"))]
)
def test_forked_pool(dtype, layout, mode):
    """The gradients of both outputs are added, even if their layouts differ."""
    stock = norm(11, dtype, mode == "train").requires_grad_(mode != "fixed")
    x = draw((3, 11, 7, 16), dtype, layout)

    def pooled(fork):
        return batch_norm_act_max_pool2d(
            x, stock.running_mean.clone(), stock.running_var.clone(), stock.weight, stock.bias,
            kernel_size=3, stride=2, padding=1, training=mode == "train", fork=fork,
        )  # fmt: skip

    (y, skip), one = pooled(fork=True), pooled(fork=False)
    assert y.data_ptr() == skip.data_ptr() and torch.equal(y, one)
    inputs = [x, *(p for p in stock.parameters() if p.requires_grad)]
    dy, dy_skip = (draw(y.shape, dtype, layout, seed).detach() for seed in (1, 2))
    found = torch.autograd.grad((y, skip), inputs, (dy, dy_skip.contiguous()))
    wanted = torch.autograd.grad(one, inputs, dy + dy_skip)
    for gradient, reference in zip(found, wanted, strict=True):
        assert_close(gradient, reference.double(), dtype)


def tensors(*shapes):
    torch.manual_seed(3)
    return [torch.randn(s, dtype=torch.float64, device=DEVICE, requires_grad=True) for s in shapes]


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_derivatives_of_derivatives(training):
    stats = (None, None)
    if not training:
        stats = tuple(t.detach().abs() + 0.5 for t in tensors((1,), (1,)))

    def two_norms(a, b, *p):
        state = BatchNormState(*stats, *p[2:])
        y, skip = batch_norm_act(
            a, *stats, *p[:2], residual=b, residual_norm=state, training=training, act="silu",
            fork=True,
        )  # fmt: skip
        return y * 2 + skip.sin()

    def forked(x, residual, *p):
        y, skip = batch_norm_act(x, *stats, *p, residual=residual, training=training, fork=True)
        return y * 2 + skip.sin()

    channel = [(1,)] * 4
    for run, inputs in (
        (two_norms, tensors((3, 1, 1), (3, 1, 1), *channel)),
        (forked, tensors((3, 1, 1), (3, 1, 1), *channel[:2])),
    ):
        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs)


def test_errors_name_the_argument():
    x = torch.randn(2, 3, 4, 4, device=DEVICE)
    mean, var = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    state = BatchNormState(mean, var)
    with pytest.raises(RuntimeError, match="pad should be at most half of effective kernel size"):
        batch_norm_act_max_pool2d(x, mean, var, kernel_size=3, padding=2)
    with pytest.raises(RuntimeError, match="Output size is too small"):
        batch_norm_act_max_pool2d(x, mean, var, kernel_size=5)
    with pytest.raises(ValueError, match="expected 4D input"):
        batch_norm_act_max_pool2d(x[0], mean, var, kernel_size=2)
    with pytest.raises(RuntimeError, match="residual_weight should contain 3 elements not 4"):
        other = state._replace(weight=torch.ones(4, device=DEVICE))
        batch_norm_act(x, mean, var, residual=x, residual_norm=other)
    with pytest.raises(ValueError, match="residual_norm needs a residual"):
        batch_norm_act(x, mean, var, residual_norm=state)
    with pytest.raises(ValueError, match="residual_norm needs a residual"):
        BatchNormAct2d(3, device=DEVICE)(x, residual_norm=nn.BatchNorm2d(3, device=DEVICE))


def test_empty_batches():
    x = torch.randn(0, 3, 4, 4, device=DEVICE, requires_grad=True)
    plain, bn, other = (BatchNormAct2d(3, device=DEVICE) for _ in range(3))
    pooled = BatchNormActMaxPool2d(3, 2, device=DEVICE)
    outputs = plain(x), bn(x, x, residual_norm=other), pooled(x)
    assert [y.shape for y in outputs] == [(0, 3, 4, 4), (0, 3, 4, 4), (0, 3, 2, 2)]
    sum(y.sum() for y in outputs).backward()
    assert x.grad.shape == x.shape
    for module in (plain, bn, other, pooled):
        assert not module.weight.grad.any() and module.num_batches_tracked == 1
        assert not module.running_mean.any() and (module.running_var == 1).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_window_outside_the_tensor_is_read(layout):
    """dy and the indices are parts of larger memory, whose other values must not affect dx.

    The memory around dy contains NaN. The memory around the indices contains valid indices, and
    some of them point into the tensor.
    """
    x, pooled = (draw((1, 4, *size), torch.float32, layout).detach() for size in ((5, 8), (3, 4)))
    ones = torch.ones(4, device=DEVICE)
    size, margin = pooled.numel(), 64

    def surrounded(inside, outside, dtype):
        memory = torch.full((size + 2 * margin,), outside, dtype=dtype, device=DEVICE)
        t = memory[margin : margin + size].as_strided(pooled.shape, pooled.stride(), margin)
        return t.fill_(inside)

    found = []
    for tap in (0, 1, 3, 5, 7, 8):
        dy = surrounded(1.0, float("nan"), torch.float32)
        index = surrounded(4, tap, torch.uint8)  # each maximum is at its window's centre
        norm_of = Norm(Statistics(ones * 0, ones))
        found.append(bn_max_pool_backward_dx(dy, index, x, norm_of, "identity", 0.0, None, 1))
    expected = torch.zeros_like(x)
    expected[:, :, ::2, ::2] = 1
    assert all(torch.equal(dx, expected) for dx in found)
