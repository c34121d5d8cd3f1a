"""Convolution with sums of its output for the batch norm behind it: kernel, gradients, routes."""

import copy
import re

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import bnres
from bnres.functional.conv import convolve
from bnres.kernels import conv_sums as kernels
from bnres.kernels.bn_forward import bn_stats
from bnres.kernels.conv_config import ConvConfig, ConvShape
from bnres.kernels.conv_sums import conv_sums
from bnres.kernels.reference import bn_stats_ref, conv_sums_ref
from bnres.nn import ConvBatchNormAct2d
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
    x = random(2, 4, 9, 17)
    x[:, 0] = 1
    filter = torch.zeros(5, 4, 1, 1, device=DEVICE)
    filter[:, 0, 0, 0] = torch.tensor([0.0, 1.0, -300.0, 1e4, 7.0])
    filter[:4, 1, 0, 0] = 1
    filter = filter.contiguous(memory_format=LAST)
    shape = ConvShape(1, 1, 1, 1, 0, 0, 1, 1)
    config = ConvConfig(16, 16, 16, num_warps=1, num_stages=1)
    y, sums = conv_sums(x, filter, shape, config=config)
    assert sums.shape == (2 * 2 + 1, 5)  # 20 tiles
    mean, rstd = bn_stats(y, None, None, 0.1, 1e-5, sums=sums)
    exact_mean, exact_rstd = bn_stats_ref(y.double(), None, None, 0.1, 1e-5)
    error = (mean - exact_mean).abs() * exact_rstd
    assert error.max() <= 1e-3  # 1e4 · 2⁻²⁴, the mean itself rounded to fp32
    assert ((rstd / exact_rstd - 1).abs() <= 1e-6).all()
    again, same = conv_sums(x, filter, shape, config=config)
    assert torch.equal(y, again) and torch.equal(sums, same)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("case", [*CASES, STEM], ids=lambda c: f"{c[1]}to{c[4]}")
def test_values_that_are_no_numbers(case):
    """They stay in their windows, and the sums are as the pass that `bn_stats` makes itself."""
    x, filter, shape = draw(case, torch.float32)
    for value in (float("inf"), float("nan")):
        x[0, 0, 2, 2] = value
        y, sums = conv_sums(x, filter, shape)
        assert torch.equal(y.isfinite(), conv_sums_ref(x, filter, shape)[0].isfinite())
        found = bn_stats(y, None, None, 0.1, 1e-5, sums=sums)
        for actual, expected in zip(found, bn_stats(y, None, None, 0.1, 1e-5), strict=True):
            assert torch.equal(actual.isfinite(), expected.isfinite())


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter touches")
def test_memory_touched():
    """The input's sectors once, and the output's."""
    from benchmarks.audit.memory import count_traffic

    x, filter = random(2, 16, 8, 8, dtype=torch.float16), random(16, 16, 3, 3, dtype=torch.float16)
    with count_traffic() as traffic:
        conv_sums(x, filter, ConvShape(3, 3, 1, 1, 1, 1, 1, 1))
    assert traffic.sectors == 2 * x.numel() * x.element_size()


def test_empty_batch():
    x, filter = torch.empty(0, 8, 4, 4, device=DEVICE), random(3, 8, 1, 1)
    y, sums = conv_sums(x, filter, ConvShape(1, 1, 1, 1, 0, 0, 1, 1))
    assert y.shape == (0, 3, 4, 4) and torch.equal(sums, torch.zeros_like(sums))


class Stem(nn.Module):
    """A ResNet's first layers: few channels, and a batch norm that is pooled."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 5, 2, 2, bias=False), nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x):
        return self.pool(torch.relu(self.bn(self.conv(x))))


def layers():
    plain = ConvBatchNormAct2d(8, 16, 3, 2, 1)
    biased = ConvBatchNormAct2d(8, 16, 3, padding=1, bias=True, momentum=None, act_layer="silu")
    return {"plain": (plain, 8), "biased": (biased, 8), "stem": (bnres.fuse(Stem()), 3)}


@pytest.fixture
def called(monkeypatch):
    """Counts the convolutions that sum their output."""
    from bnres.ops import conv2d_sums

    counts, forward = [0], conv2d_sums.forward_impl

    def count(*arguments):
        counts[0] += 1
        return forward(*arguments)

    monkeypatch.setattr(conv2d_sums, "forward_impl", count)
    return counts


@pytest.mark.parametrize("name", ["plain", "biased", "stem"])
def test_training_by_the_kernel_is_that_by_torch(name, called):
    torch.manual_seed(0)
    layer, channels = layers()[name]
    layer = layer.to(DEVICE, memory_format=LAST)
    other = copy.deepcopy(layer)
    x = random(3, channels, 9, 9)
    results = []
    for net, route in ((layer, "kernel"), (other, "torch")):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with bnres.use_conv_route(route):
            y = net(leaf)
            net(leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in net.parameters()), *net.buffers()])
    assert called == [2]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


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
def test_arguments_are_torchs(options):
    """What torch takes works, and what it refuses it refuses."""
    x, filter = random(2, 8, 5, 5), random(4, 8, 3, 3)
    arguments = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **options}
    try:
        expected = torch.nn.functional.conv2d(x, filter, None, **arguments)
    except RuntimeError as error:
        expected = error
    with bnres.use_conv_route("kernel"):
        if isinstance(expected, RuntimeError):
            with pytest.raises(RuntimeError, match=re.escape(str(expected)[:40])):
                convolve(x, filter, **arguments, sums=True)
        else:
            y, sums = convolve(x, filter, **arguments, sums=True)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            assert sums is not None


def test_the_format_is_torchs(called):
    """One channel lies in both formats, so torch decides."""
    for memory_format in (torch.contiguous_format, LAST):
        filter = random(4, 1, 3, 3).contiguous(memory_format=memory_format)
        x = random(2, 1, 6, 6)
        with bnres.use_conv_route("kernel"):
            y, _ = convolve(x, filter, 1, 1, 1, 1, sums=True)
        expected = torch.nn.functional.conv2d(x, filter, None, 1, 1)
        assert y.stride() == expected.stride()
    assert called == [0]


def test_frozen_layers_and_other_inputs_go_to_torch(called):
    layer, channels = layers()["plain"]
    layer.to(DEVICE)
    x = random(3, channels, 9, 9)
    with bnres.use_conv_route("kernel"):
        layer(x.contiguous())
        layer.double()(x.double())
        layer.float().bn.eval()
        layer(x)
        assert called == [0]
        layer.train()(x)
    layer(x)
    assert called == [1]


def test_derivatives(called):
    """Of the first, second and forward kind, in which nothing hangs on the sums."""
    torch.manual_seed(0)
    x, filter = random(2, 8, 3, 3).requires_grad_(), random(4, 8, 2, 2).requires_grad_()
    directions = random(2, 8, 3, 3), random(4, 8, 2, 2)

    def run(x, filter):
        return convolve(x, filter, 1, 1, 1, 1, sums=True)[0].square().sum()

    found = []
    for route in ("kernel", "torch"):
        with bnres.use_conv_route(route):
            first = torch.autograd.grad(run(x, filter), (x, filter), create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, filter))
            tangent = torch.func.jvp(run, (x.detach(), filter.detach()), directions)[1]
            found.append([*first, *second, tangent])
    assert called == [2]
    for actual, expected in zip(*found, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale)


def test_operands_are_cast_once():
    """Whether our kernel is taken is asked before anything is cast."""
    casts = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            casts.extend([op] if op is torch.ops.aten._to_copy.default else [])
            return op(*args, **(kwargs or {}))

    layer, channels = layers()["plain"]
    layer = layer.to(DEVICE, memory_format=LAST)
    for training in (True, False):
        layer.train(training)
        with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad(), Count():
            layer(random(2, channels, 9, 9))
        assert len(casts) == 2  # the input and the filter
        casts.clear()


def test_autocast_is_that_of_conv2d(called):
    layer, channels = layers()["plain"]
    layer = layer.to(DEVICE, memory_format=LAST)
    x = random(2, channels, 9, 9)
    # The interpreter's tl.dot takes no bf16, and autocast on the CPU takes fp16 as well.
    with torch.autocast(DEVICE, torch.float16), bnres.use_conv_route("kernel"):
        y = layer(x)
    assert called == [1] and y.dtype == torch.float16
    y.float().sum().backward()
    assert layer.conv.weight.grad.dtype == torch.float32
    norm = nn.BatchNorm2d(16, dtype=torch.float64, device=DEVICE)
    assert_close(y.detach(), torch.relu(norm(layer.conv(x).double())), y.dtype)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
def test_compiled_layer_is_the_eager_one(bias):
    torch.manual_seed(0)
    layer = ConvBatchNormAct2d(8, 8, 3, padding=1, bias=bias).to(DEVICE, memory_format=LAST)
    other = copy.deepcopy(layer)
    x = random(2, 8, 4, 4)
    graphs = []

    def record(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    with bnres.use_conv_route("kernel"):
        compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=record), fullgraph=True)
        results = []
        for net, parts in ((compiled, layer), (other, other)):
            y = net(x)
            y.square().sum().backward()
            results.append([y, *(p.grad for p in parts.parameters()), *parts.buffers()])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    assert "bnres.conv2d_sums_forward" in " ".join(
        str(node.target) for node in graphs[0].graph.nodes
    )
