"""Tests convolution with batch norm: the kernel, the convolution's bias, and the routes."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import bnres
from bnres.functional import conv2d_batch_norm_act
from bnres.kernels.conv import conv_bn_act
from bnres.kernels.conv_config import ConvShape, search_space
from bnres.kernels.norm import Norm, RunningStatistics
from bnres.kernels.reference import ACTIVATION_FORMULAS, conv_bn_act_ref
from bnres.nn import ConvBatchNormAct2d
from bnres.operations import conv_batch_norm_act as operation
from tests.device import DEVICE
from tests.tolerances import assert_close

LAST = torch.channels_last
# Each case is N, C, H, W, the number of output channels, and the window. In each dimension, at
# least one case has a size that is not a multiple of the kernel's block size.
CASES = [
    (2, 16, 9, 8, 24, ConvShape(3, 3, 1, 1, 1, 1, 1, 1)),
    (3, 17, 11, 10, 37, ConvShape(3, 2, 2, 1, 1, 0, 1, 2)),
    (2, 65, 5, 5, 130, ConvShape(1, 1, 2, 2, 0, 0, 1, 1)),
    (1, 8, 16, 17, 8, ConvShape(7, 7, 2, 2, 3, 3, 1, 1)),
    (1, 1, 4, 4, 1, ConvShape(2, 2, 1, 1, 1, 1, 3, 1)),
    (2, 3, 14, 14, 20, ConvShape(7, 7, 2, 2, 3, 3, 1, 1)),
]


def random(*shape, dtype=torch.float32):
    x = torch.randn(shape, device=DEVICE).to(dtype)
    return x.contiguous(memory_format=LAST) if len(shape) == 4 else x


def plain_norm(channels):
    """Returns a batch norm whose output equals its input."""
    zeros = torch.zeros(channels, device=DEVICE)
    return Norm(RunningStatistics(zeros, zeros + 1, 0.0))


def double(*values):
    """Returns the values with all tensors, also those inside tuples, converted to fp64."""
    return [tree_map(lambda v: v.double() if isinstance(v, torch.Tensor) else v, v) for v in values]


@pytest.fixture
def called(monkeypatch):
    """Returns a list whose only item is the number of calls of the kernel's operator."""
    counts, forward = [0], operation._run_forward

    def count(*arguments, **named):
        counts[0] += 1
        return forward(*arguments, **named)

    monkeypatch.setattr(operation, "_run_forward", count)
    return counts


# The interpreter's tl.dot does not support bf16.
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[1]}to{c[4]}")
def test_kernel_agrees_with_its_reference(case, dtype):
    torch.manual_seed(0)
    n, c, h, w, k, shape = case
    x = random(n, c, h, w, dtype=dtype)
    filter = random(k, c, shape.kernel_h, shape.kernel_w) / (c * shape.taps) ** 0.5
    filter = filter.to(dtype).contiguous(memory_format=LAST)
    running = RunningStatistics(random(k), torch.rand(k, device=DEVICE) + 0.5, 1e-3)
    norm = Norm(running, random(k), random(k))
    residual = random(n, k, *shape.output_size(h, w), dtype=dtype)
    for conv_bias, given, added, act in (
        (None, norm, residual, "relu"),
        (random(k), norm._replace(weight=None), None, "silu"),
        (random(k), plain_norm(k), residual, "identity"),
        (None, norm._replace(bias=None), None, "gelu"),
    ):
        y = conv_bn_act(x, filter, conv_bias, given, added, act, 0.0, shape)
        expected = conv_bn_act_ref(*double(x, filter, conv_bias, given, added), act, 0.0, shape)
        assert y.is_contiguous(memory_format=LAST) and y.dtype == dtype
        assert_close(y, expected, dtype, tf32=dtype == torch.float32)


@pytest.mark.parametrize("config", search_space(162, 16, 24, 4)[:3], ids=str)
def test_kernel_agrees_in_every_configuration(config):
    torch.manual_seed(0)
    n, c, h, w, k, shape = CASES[0]
    x, filter = random(n, c, h, w), random(k, c, 3, 3)
    y = conv_bn_act(x, filter, None, plain_norm(k), None, "relu", 0.0, shape, config=config)
    expected = conv_bn_act_ref(*double(x, filter), None, plain_norm(k), None, "relu", 0.0, shape)
    assert_close(y, expected, torch.float32, tf32=True)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[1]}to{c[4]}")
def test_values_that_are_not_finite_stay_in_their_windows(case):
    torch.manual_seed(0)
    n, c, h, w, k, shape = case
    x, filter = random(n, c, h, w), random(k, c, shape.kernel_h, shape.kernel_w)
    for value in (float("inf"), float("nan")):
        x[0, 0, 2, 2] = value
        y = conv_bn_act(x, filter, None, plain_norm(k), None, "identity", 0.0, shape)
        expected = conv_bn_act_ref(x, filter, None, plain_norm(k), None, "identity", 0.0, shape)
        assert torch.equal(y.isfinite(), expected.isfinite())


def test_empty_batch():
    x, filter = torch.empty(0, 8, 4, 4, device=DEVICE), random(3, 8, 1, 1)
    y = conv_bn_act(
        x, filter, None, plain_norm(3), None, "relu", 0.0, ConvShape(1, 1, 1, 1, 0, 0, 1, 1)
    )
    assert y.shape == (0, 3, 4, 4)


def layer(**options):
    torch.manual_seed(0)
    ours = ConvBatchNormAct2d(8, 16, 3, padding=1, **options).to(DEVICE).double()
    nn.init.uniform_(ours.bn.weight, 0.5, 1.5)
    stock = nn.BatchNorm2d(16, momentum=options.get("momentum", 0.1)).to(DEVICE).double()
    stock.load_state_dict(ours.bn.state_dict())
    return ours, copy.deepcopy(ours.conv), stock


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("padding_mode", ["zeros", pytest.param("reflect", marks=pytest.mark.slow)])
def test_bias_before_a_batch_norm(momentum, padding_mode):
    """In training the convolution's bias changes only the running mean.

    The batch norm subtracts the mean of the batch, which includes the bias.
    """
    ours, conv, bn = layer(bias=True, momentum=momentum, padding_mode=padding_mode)
    x = torch.randn(3, 8, 4, 4, dtype=torch.float64, device=DEVICE)
    residual = torch.randn(3, 16, 4, 4, dtype=torch.float64, device=DEVICE)
    for _ in range(2):
        assert_close(ours(x, residual), F.relu(bn(conv(x)) + residual), torch.float64)
    ours(x, residual).square().sum().backward()
    F.relu(bn(conv(x)) + residual).square().sum().backward()
    assert_close(ours.conv.weight.grad, conv.weight.grad, torch.float64)
    assert torch.equal(ours.conv.bias.grad, torch.zeros_like(conv.bias))
    for b, c in zip(ours.bn.buffers(), bn.buffers(), strict=True):
        assert_close(b, c, torch.float64)
    ours.eval()
    bn.eval()
    ours.zero_grad()
    conv.zero_grad()
    y, expected = ours(x, residual), F.relu(bn(conv(x)) + residual)
    y.sum().backward()
    expected.sum().backward()
    assert_close(y, expected, torch.float64)
    assert_close(ours.conv.bias.grad, conv.bias.grad, torch.float64)
    with torch.no_grad():
        assert_close(ours(x, residual), expected, torch.float64)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("route", ["torch", "kernel"])
def test_routes_agree(groups, route, called, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.manual_seed(0)
    ours = ConvBatchNormAct2d(8, 16, 3, 2, 1, groups=groups).to(DEVICE).eval()
    x = torch.randn(2, 8, 5, 5, device=DEVICE)
    wide = F.conv2d(*double(x, ours.conv.weight), None, 2, 1, groups=groups)
    with torch.no_grad(), bnres.use_conv_route(route):
        assert_close(ours(x), F.relu(wide / (1 + 1e-5) ** 0.5), torch.float32, tf32=True)
    assert called == [1 if route == "kernel" and groups == 1 else 0]
    with pytest.raises(ValueError, match="route must be one of auto, torch, kernel, got 'x'"):
        bnres.use_conv_route("x").__enter__()


def test_fp32_takes_the_kernel_only_if_tf32_is_allowed(called, monkeypatch):
    torch.manual_seed(0)
    layer = ConvBatchNormAct2d(8, 16, 3, padding=1).to(DEVICE, memory_format=LAST).eval()
    half = copy.deepcopy(layer).half()
    x = random(2, 8, 5, 5)
    for allowed, kernels in ((False, 0), (True, 1)):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        called[0] = 0
        with torch.no_grad(), bnres.use_conv_route("kernel"):
            y = layer(x)
            assert called == [kernels]
            half(x.half())
            assert called == [kernels + 1]
            if not allowed:
                assert torch.equal(y, layer.bn(layer.conv(x)))


def test_autocast_works_as_for_conv2d():
    layer = ConvBatchNormAct2d(8, 8, 1).to(DEVICE).eval()
    x = torch.randn(2, 8, 4, 4, device=DEVICE)
    # fp16, because the interpreter's tl.dot does not support bf16.
    with torch.no_grad(), torch.autocast(DEVICE, torch.float16):
        for route in ("torch", "kernel"):
            with bnres.use_conv_route(route):
                y = layer(x)
            assert y.dtype == torch.float16
            expected = F.relu(layer.conv(x).double() / (1 + 1e-5) ** 0.5)
            assert_close(y, expected, torch.float16)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": (1,), "padding": [1], "dilation": (1,)},
        {"stride": 0},
        {"padding": -1},
        {"stride": (1, 1, 1)},
    ],
    ids=str,
)
def test_arguments_are_handled_as_in_torch(options, called):
    """Arguments that torch accepts work, and arguments that torch rejects raise torch's error."""
    x, filter = random(2, 8, 5, 5).half(), random(4, 8, 3, 3).half()
    arguments = (x, filter, None, *plain_norm(4).statistics[:2])
    with torch.no_grad(), bnres.use_conv_route("kernel"):
        try:
            expected = F.relu(F.conv2d(*double(x, filter), None, **options))
        except RuntimeError as error:
            with pytest.raises(RuntimeError, match=re.escape(str(error)[:40])):
                conv2d_batch_norm_act(*arguments, eps=0.0, **options)
        else:
            y = conv2d_batch_norm_act(*arguments, eps=0.0, **options)
            assert_close(y, expected, torch.float16)
            assert called == [1]


def test_operands_are_cast_once():
    """Each operand is cast once, because the route is chosen before the operands are cast."""
    casts = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            casts.extend([op] if op is torch.ops.aten._to_copy.default else [])
            return op(*args, **(kwargs or {}))

    layer = ConvBatchNormAct2d(8, 16, 3, 2, 1).to(DEVICE, memory_format=LAST).eval()
    with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad(), Count():
        layer(random(2, 8, 9, 9))
    assert len(casts) == 2  # the input and the filter


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
def test_compiled_layer_equals_the_eager_one(bias):
    torch.manual_seed(0)
    layer = ConvBatchNormAct2d(8, 8, 3, padding=1, bias=bias).to(DEVICE, memory_format=LAST)
    other = copy.deepcopy(layer)
    x = random(2, 8, 4, 4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for net, parts in ((compiled, layer), (other, other)):
        y = net(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in parts.parameters()), *parts.buffers()])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_compiled_layer_takes_the_kernel():
    torch.manual_seed(0)
    layer = ConvBatchNormAct2d(8, 8, 3, padding=1).to(DEVICE, memory_format=LAST).half().eval()
    x, graphs = random(2, 8, 4, 4, dtype=torch.float16), []

    def record(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad(), bnres.use_conv_route("kernel"):
        assert torch.equal(torch.compile(layer, backend=record, fullgraph=True)(x), layer(x))
    assert "bnres.conv2d_batch_norm_act_forward" in str(graphs[0].graph)


@pytest.mark.parametrize("route", ["torch", "kernel"])
def test_errors(route, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    x, filter = torch.randn(2, 8, 4, 4, device=DEVICE), torch.randn(4, 8, 1, 1, device=DEVICE)
    mean, var = torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)
    with torch.no_grad(), bnres.use_conv_route(route):
        with pytest.raises(ValueError, match=r"residual must have the shape \(2, 4, 4"):
            conv2d_batch_norm_act(x, filter, None, mean, var, residual=x)
        with pytest.raises(RuntimeError, match="running_var should contain 4 elements not 3"):
            conv2d_batch_norm_act(x, filter, None, mean, var[:3])
        with pytest.raises(RuntimeError, match="running_mean must be defined in evaluation mode"):
            conv2d_batch_norm_act(x, filter, None, None, None)


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter touches")
@pytest.mark.parametrize("has_residual", [False, True], ids=["plain", "residual"])
def test_memory_touched(has_residual):
    """The kernel reads all of x and the residual, and writes all of y, without reading y.

    A sector that is read several times counts once. Reads of the filter and of the batch norm's
    tensors are not counted.
    """
    from benchmarks.audit.memory import count_traffic

    x, filter = random(2, 16, 8, 8, dtype=torch.float16), random(16, 16, 3, 3, dtype=torch.float16)
    residual = random(2, 16, 8, 8, dtype=torch.float16) if has_residual else None
    shape = ConvShape(3, 3, 1, 1, 1, 1, 1, 1)
    with count_traffic() as traffic:
        conv_bn_act(x, filter, None, plain_norm(16), residual, "relu", 0.0, shape)
    assert traffic.sectors == (2 + has_residual) * x.numel() * x.element_size()


def test_activations_agree_with_the_reference():
    torch.manual_seed(0)
    x, filter = random(1, 8, 2, 3), random(8, 8, 1, 1)
    shape = ConvShape(1, 1, 1, 1, 0, 0, 1, 1)
    for act in ACTIVATION_FORMULAS:
        y = conv_bn_act(x, filter, None, plain_norm(8), None, act, 0.2, shape)
        expected = conv_bn_act_ref(*double(x, filter), None, plain_norm(8), None, act, 0.2, shape)
        assert_close(y, expected, torch.float32, tf32=True)
