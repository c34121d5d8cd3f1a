"""Compares `StemConv2d` with torch's convolution.

`StemConv2d` is the first convolution of a ResNet. On a GPU it may convert its input from space to
depth.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnres
from benchmarks.torchvision_import import torchvision
from bnres.functional import stem_conv2d
from bnres.nn import StemConv2d
from bnres.operations import stem_conv
from tests.device import DEVICE
from tests.tolerances import assert_close

CL = torch.channels_last


@pytest.fixture
def over_blocks(monkeypatch):
    """Makes each call use a space-to-depth input, and returns the list of the calls' inputs."""
    inputs = []
    monkeypatch.setattr(stem_conv, "takes_blocks", lambda x, w: inputs.append(x) is None)
    return inputs


@pytest.fixture
def ran(monkeypatch):
    """Makes each call decide, as on a GPU, whether to use a space-to-depth input.

    Returns a list with one item for each call that used a space-to-depth input.
    """
    runs, over = [], stem_conv.conv_over_blocks
    monkeypatch.setattr(stem_conv, "_on_gpu", lambda input: True)
    monkeypatch.setattr(stem_conv, "conv_over_blocks", lambda *ts: runs.append(1) or over(*ts))
    return runs


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("layout", [CL, torch.contiguous_format])
def test_equals_torchs_convolution(channels, layout, over_blocks):
    torch.manual_seed(0)
    x = torch.randn(3, channels, 10, 14, dtype=torch.float64, device=DEVICE)
    x = x.contiguous(memory_format=layout)
    conv = StemConv2d(channels, 5, bias=True, device=DEVICE, dtype=torch.float64)
    y, expected = conv(x), F.conv2d(x, conv.weight, conv.bias, 2, 3)
    assert len(over_blocks) == 1
    assert_close(y, expected, torch.float64)
    dy = torch.randn_like(expected)
    parameters = [conv.weight, conv.bias]
    for got, want in zip(
        torch.autograd.grad(y, parameters, dy), torch.autograd.grad(expected, parameters, dy),
        strict=True,
    ):  # fmt: skip
        assert_close(got, want, torch.float64)


def test_second_derivatives(over_blocks):
    torch.manual_seed(0)
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64, device=DEVICE)
    weight = torch.randn(1, 1, 7, 7, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda w: stem_conv2d(x, w).sin(), (weight,))


def test_transforms(ran, monkeypatch):
    """torch.func's transforms of our convolution compute the same as those of torch's conv2d."""
    monkeypatch.setattr(stem_conv, "_dtype", lambda x, w: torch.bfloat16)
    torch.manual_seed(0)
    x, tangent = (torch.randn(2, 3, 8, 8).to(memory_format=CL).bfloat16() for _ in range(2))
    weight = torch.randn(4, 3, 7, 7).bfloat16()
    found = torch.func.jvp(lambda t: stem_conv2d(t, weight), (x,), (tangent,))
    assert ran
    for actual, given in zip(found, (x, tangent), strict=True):
        assert_close(actual, F.conv2d(given.double(), weight.double(), None, 2, 3), torch.bfloat16)
    ran.clear()
    part = x[:1, :, :2, :2].contiguous(memory_format=CL)
    for derivative in (torch.func.jacfwd, torch.func.hessian):
        found = derivative(lambda w: stem_conv2d(part, w).square().sum())(weight[:1])
        expected = derivative(
            lambda w: F.conv2d(part.double(), w, None, 2, 3).square().sum()
        )(weight[:1].double())  # fmt: skip
        scale = expected.abs().max()
        assert_close(found / scale, expected / scale, torch.bfloat16)
    assert ran
    ran.clear()
    gradient = torch.func.grad(lambda t: stem_conv2d(t, weight).sum())(x)
    wide = torch.func.grad(lambda t: F.conv2d(t, weight.double(), None, 2, 3).sum())(x.double())
    assert not ran
    assert_close(gradient, wide, torch.bfloat16)


@pytest.mark.parametrize("inner", [None, "aot_eager"])
def test_fused_model_under_autocast(inner, ran):
    torch.manual_seed(0)
    # The activations are smooth. With relu, a rounding error could set an element's gradient to 0.
    stock = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.Sigmoid(), nn.BatchNorm2d(8), nn.SiLU())
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=CL)
    options = {} if inner is None else {"options": {"inner": inner}}
    fused = torch.compile(stock, backend="bnres", **options)
    steps = []
    with bnres.use_backend("aten"):
        for model in (fused, stock):
            stock.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                y = model(x)
            y.float().square().sum().backward()
            steps.append([y.detach().float(), stock[0].weight.grad.clone()])
    assert ran
    for actual, expected in zip(*steps, strict=True):
        scale = expected.abs().max()
        assert_close(actual / scale, expected.double() / scale, torch.bfloat16)


def test_bfloat16(over_blocks):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16, device=DEVICE).contiguous(memory_format=CL)
    conv = StemConv2d(3, 8, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = conv(x)
    rounded = conv.weight.bfloat16().double()
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=CL)
    assert_close(y, F.conv2d(x.bfloat16().double(), rounded, None, 2, 3), torch.bfloat16)


def draw(shape=(2, 3, 8, 8), dtype=torch.bfloat16, layout=CL, **options):
    return torch.ones(shape, dtype=dtype, **options).contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"shape": (2, 4, 8, 8)}, True),
        ({"shape": (2, 5, 8, 8)}, False),
        ({"shape": (2, 1, 8, 8)}, False),
        ({"dtype": torch.float64}, False),
        ({"dtype": torch.uint8}, False),
        ({"dtype": torch.complex64}, False),
        ({"shape": (2, 3, 7, 8)}, False),
        ({"shape": (2, 3, 8, 7)}, False),
        ({"dtype": torch.float16}, False),
        ({"dtype": torch.float32}, False),
        ({"layout": torch.contiguous_format}, False),
        ({"requires_grad": True}, False),
    ],
    ids=str,
)
def test_choice(options, expected, monkeypatch):
    x = draw(**options)
    weight = draw((4, x.shape[1], 7, 7), x.dtype)
    assert not stem_conv.takes_blocks(x, weight)  # because the tensors are on the CPU
    monkeypatch.setattr(stem_conv, "_on_gpu", lambda input: True)
    assert stem_conv.takes_blocks(x, weight) is expected
    with torch.no_grad():
        assert stem_conv.takes_blocks(x, weight) is (expected or "requires_grad" in options)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = expected or options.get("dtype") in (torch.float16, torch.float32)
        assert stem_conv.takes_blocks(x, weight.float()) is mixed
    assert not stem_conv.takes_blocks(x, weight.double())
    assert not stem_conv.takes_blocks(x, draw((4, x.shape[1], 3, 3)))
    assert not torch.vmap(lambda t: torch.tensor(stem_conv.takes_blocks(t, weight)))(x[None]).any()


def test_models(over_blocks):
    """Our layers and fused models use the space-to-depth input, and torchvision's model doesn't."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32, device=DEVICE)
    stock = torchvision.models.resnet18(num_classes=3).to(DEVICE).eval()
    ours = bnres.models.resnet18(num_classes=3).to(DEVICE).eval()
    ours.load_state_dict(stock.state_dict())
    expected = stock(x)
    assert not over_blocks
    with bnres.use_backend("aten"):
        assert_close(ours(x), expected.double(), torch.float32)
        assert len(over_blocks) == 1
        assert_close(bnres.fuse(stock)(x), expected.double(), torch.float32)
        assert len(over_blocks) == 2


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 4, 7, 2, 3), nn.Conv2d(3, 4, 7, 2, 2), nn.Conv2d(3, 4, 7, 1, 3),
        nn.Conv2d(3, 3, 7, 2, 3, groups=3), nn.Conv2d(3, 4, 7, 2, 3, dilation=2),
        nn.Conv2d(3, 4, 5, 2, 3), nn.Conv2d(3, 4, 7, 2, "valid"), nn.Conv2d(3, 4, 7, (2, 1), 3),
    ],
    ids=str,
)  # fmt: skip
def test_only_the_stems_convolution_is_replaced(conv, over_blocks):
    model = nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(), nn.Sigmoid())
    x = torch.randn(2, 3, 16, 16)
    # Because of the max-pool, `fuse` does not combine the convolution and the batch norm in one
    # operation.
    model.insert(3, nn.MaxPool2d(3, 2, 1))
    with bnres.use_backend("aten"):
        assert_close(bnres.fuse(model)(x), model(x).double(), torch.float32)
    is_first = conv.stride == (2, 2) and conv.padding == (3, 3) and conv.kernel_size == (7, 7)
    assert len(over_blocks) == (is_first and conv.groups == conv.dilation[0] == 1)


@pytest.mark.parametrize(
    "change",
    [{"stride": (1, 1)}, {"padding": (2, 2)}, {"dilation": (2, 2)}, {"padding_mode": "reflect"}],
    ids=str,
)
def test_changed_attributes(change, over_blocks):
    conv, stock = StemConv2d(3, 4), nn.Conv2d(3, 4, 7, 2, 3, bias=False)
    stock.load_state_dict(conv.state_dict())
    for module in (conv, stock):
        for name, value in change.items():
            setattr(module, name, value)
        twice = [v for v in module.padding[::-1] for _ in range(2)]
        module._reversed_padding_repeated_twice = twice
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(conv(x), stock(x)) and not over_blocks


def test_export_has_torchs_convolution(monkeypatch):
    monkeypatch.setattr(stem_conv, "_on_gpu", lambda input: True)
    x = draw()
    program = torch.export.export(StemConv2d(3, 4, dtype=torch.bfloat16), (x,))
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls == [torch.ops.aten.conv2d.default]
    traced = torch.fx.symbolic_trace(StemConv2d(3, 4, dtype=torch.bfloat16))
    assert traced(x).shape == (2, 4, 4, 4)


@pytest.mark.slow
def test_images_of_several_sizes_compile(monkeypatch):
    monkeypatch.setattr(stem_conv, "_on_gpu", lambda input: True)
    stock = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.Sigmoid(), nn.BatchNorm2d(8), nn.SiLU())
    fused = torch.compile(stock, backend="bnres", options={"inner": "inductor"})
    with bnres.use_backend("aten"):
        for size in ((8, 8), (12, 10), (16, 20)):
            x = torch.randn(2, 3, *size).contiguous(memory_format=CL)
            with torch.autocast("cpu", torch.bfloat16):
                y = fused(x)
            y.float().sum().backward()
            assert y.shape == (2, 8, size[0] // 2, size[1] // 2)


def test_repr_and_keys():
    conv = StemConv2d(3, 64)
    text = "StemConv2d(3, 64, kernel_size=(7, 7), stride=(2, 2), padding=(3, 3), bias=False)"
    assert repr(conv) == text
    assert list(conv.state_dict()) == ["weight"]
