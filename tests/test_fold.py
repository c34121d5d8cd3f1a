"""Tests that outputs stay the same when `bnres.fold` folds batch norms into convolutions."""

import copy
import gc
import pickle
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnres
from benchmarks.torchvision_import import torchvision
from bnres import models, use_backend, use_conv_route
from bnres.models.layers import stock_norm_act
from tests.device import DEVICE
from tests.tolerances import assert_close

ATEN = "triton" if DEVICE == "cuda" else "aten"
# For each model, the number of batch norms that are not folded, because their input is not a
# convolution's output or because they run only in training.
KEPT = {"resnet18": 0, "densenet121": 62, "mobilenet_v2": 0, "googlenet": 2, "regnet_y_400mf": 0}


def with_statistics(model):
    """Returns ``model`` with random running statistics and parameters, as after training."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def batch(*shape):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


@pytest.mark.parametrize(
    "name", [n if n == "resnet18" else pytest.param(n, marks=pytest.mark.slow) for n in KEPT]
)
def test_architectures(name):
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    stock = getattr(torchvision.models, name)(weights=None, num_classes=5, **options)
    stock, x = with_statistics(stock.to(DEVICE)).double(), batch(2, 3, 64, 64)
    with torch.no_grad(), use_backend(ATEN):
        folded = bnres.fold(stock, x)
        expected = stock(x)
        assert (folded(x) - expected).abs().max() <= 1e-9 * max(1, expected.abs().max())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == KEPT[name]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in stock.modules()) > KEPT[name]


@pytest.mark.parametrize(
    "name", [pytest.param("resnet18", marks=pytest.mark.slow), "resnet18-seed", "lenet-seed"]
)
def test_our_models(name):
    torch.manual_seed(0)
    stock = models.create_model(name, num_classes=5, in_channels=1, fused=False).to(DEVICE)
    x = torch.randn(2, 1, 28, 28, device=DEVICE)
    with torch.no_grad(), use_backend(ATEN):
        folded = bnres.fold(bnres.fuse(with_statistics(stock)), x)
        torch.testing.assert_close(folded(x), stock(x), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


@pytest.mark.parametrize("route", ["torch", "kernel"])
def test_residual_block_through_the_kernels(route, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.manual_seed(0)
    block = partial(models.blocks.BasicBlock, norm_act=stock_norm_act)
    stock = with_statistics(nn.Sequential(block(8, 16, 2), block(16, 16)).to(DEVICE))
    x = torch.randn(2, 8, 6, 6, device=DEVICE)
    with torch.no_grad(), use_conv_route(route):
        expected = copy.deepcopy(stock).double()(x.double())
        assert_close(bnres.fuse(stock)(x), expected, torch.float32, tf32=True)


class IgnoresItsBias(nn.Conv2d):
    def forward(self, input):
        return F.conv2d(input, self.weight)


def test_batch_norms_that_can_not_be_folded():
    shared = nn.Conv2d(3, 3, 1)
    hooked, hooked_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    for module in (hooked, hooked_norm):
        module.register_forward_hook(lambda module, inputs, output: None)
    model = nn.Sequential(
        nn.Sequential(shared, nn.BatchNorm2d(3)),
        nn.Sequential(shared, nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False)),
        nn.Sequential(hooked, nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 3, 1), hooked_norm),
        nn.Sequential(IgnoresItsBias(3, 3, 1, bias=False), nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 3, 1), bnres.nn.BatchNormAct2d(3)),
    )
    model = model.to(DEVICE).double().eval()
    x = batch(2, 3, 4, 4)
    with use_backend(ATEN):
        folded = bnres.fold(model, x)
        torch.testing.assert_close(folded(x), model(x))
    kept = [not isinstance(stage[1], nn.Identity) for stage in folded]
    assert kept == [True, True, True, False, True, True, True, True]


class Shares(nn.Module):
    """A model that calls both its convolutions and one of its batch norms twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.a(self.conv(x)).relu() + self.a(self.other(x))
        return self.conv(y) + self.b(self.other(y))


def test_modules_called_more_than_once_are_kept():
    model = with_statistics(Shares().to(DEVICE)).double()
    x = batch(2, 3, 4, 4)
    folded = bnres.fold(model, x)
    torch.testing.assert_close(folded(x), model(x))
    assert isinstance(folded.a, nn.BatchNorm2d) and isinstance(folded.b, nn.BatchNorm2d)


class ReadsElsewhere(nn.Module):
    """A model whose forward reads a tensor of its convolution or batch norm directly."""

    READS = (
        lambda m, x, y: y + F.conv2d(x, m.conv.weight, padding=1),
        lambda m, x, y: F.relu(y) - m.conv.bias.view(1, -1, 1, 1),
        lambda m, x, y: y * m.bn.weight.abs().view(1, -1, 1, 1),
        lambda m, x, y: y + m.bn.running_mean.view(1, -1, 1, 1),
        lambda m, x, y: F.batch_norm(m.conv.forward(x), m.bn.running_mean, m.bn.running_var),
        lambda m, x, y: m.bn(F.conv2d(x, m.conv.weight, padding=1)),
    )

    def __init__(self, read):
        super().__init__()
        self.read, self.conv, self.bn = read, nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        called = self.read in ReadsElsewhere.READS[:4]
        return self.read(self, x, self.bn(self.conv(x)) if called else x)


@pytest.mark.parametrize("read", ReadsElsewhere.READS)
def test_tensors_that_are_read_elsewhere_are_kept(read):
    model = with_statistics(ReadsElsewhere(read).to(DEVICE)).double()
    x = batch(2, 3, 4, 4)
    folded = bnres.fold(model, x)
    assert isinstance(folded.bn, nn.BatchNorm2d)
    torch.testing.assert_close(folded(x), model(x))


class CallsWithAnotherTensor(nn.Module):
    """A model that calls a module with ``other`` instead of the module's tensor ``name``."""

    def __init__(self, name):
        super().__init__()
        self.name, self.conv, self.bn = name, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        own = self.get_parameter(name) if "running" not in name else self.get_buffer(name)
        self.register_buffer("other", own.detach() + 1)

    def forward(self, x):
        for child in ("conv", "bn"):
            owner, _, name = self.name.partition(".")
            tensors = {name: self.other} if owner == child else {}
            x = torch.func.functional_call(getattr(self, child), tensors, (x,))
        return x


@pytest.mark.parametrize(
    "name",
    ["conv.weight", "conv.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"],
)
def test_modules_called_with_another_tensor_are_kept(name):
    model = with_statistics(CallsWithAnotherTensor(name).to(DEVICE)).double()
    x = batch(2, 3, 4, 4)
    folded = bnres.fold(model, x)
    assert isinstance(folded.bn, nn.BatchNorm2d)
    torch.testing.assert_close(folded(x), model(x))


def test_forwards_that_can_not_be_folded_are_refused():
    class AsksForABias(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.bn(self.conv(x))
            return y if self.conv.bias is None else y * 2

    class Prints(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            print(end="")
            return y

    x = batch(2, 3, 4, 4).float()
    with pytest.raises(ValueError, match="its forward would run different operations"):
        bnres.fold(AsksForABias().to(DEVICE).eval(), x)
    with pytest.raises(ValueError, match="can't capture its forward in one graph"):
        bnres.fold(Prints(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).to(DEVICE).eval(), x)


def test_folded_models_contain_only_modules_of_torch():
    stock = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    stock = with_statistics(stock.to(DEVICE))
    x = torch.randn(2, 8, 3, 3, device=DEVICE)
    folded = bnres.fold(stock, x)
    assert [type(module) for module in folded] == [nn.Conv2d, nn.Identity, nn.ReLU]
    assert type(folded) is nn.Sequential and folded[2] is not stock[2]
    with torch.no_grad():
        expected = folded(x)
        torch.testing.assert_close(expected, stock(x), rtol=1e-4, atol=1e-4)
        scripted = torch.jit.trace(folded, x)
        exported = torch.export.export(folded, (x,))
        others = (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded)), scripted)
        for other in (*others, exported.module()):
            assert torch.equal(other(x), expected)
    assert "bnres" not in str(exported.graph) and b"bnres" not in pickle.dumps(folded)


def test_training_mode_is_refused():
    model = models.resnet18(fused=False)
    x = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match="model must be in eval mode"):
        bnres.fold(model, x)
    model.eval().layer1[0].bn1.train()
    with pytest.raises(ValueError, match=r"layer1\.0\.bn1 is in training mode"):
        bnres.fold(model, x)


def test_a_model_without_operations():
    assert type(bnres.fold(nn.Identity().eval(), torch.zeros(2))) is nn.Identity


def test_without_inputs():
    with pytest.raises(TypeError, match=r"needs example inputs of the model: fold\(model, "):
        bnres.fold(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval())


def test_no_tensor_of_a_model_outlives_it():
    x = batch(2, 3, 4, 4).float()
    folded = bnres.fold(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).to(DEVICE).eval(), x)
    weight = weakref.ref(folded[0].weight)
    del folded
    gc.collect()
    assert weight() is None


def test_an_error_in_the_forward_is_raised():
    class Refuses(nn.Sequential):
        def forward(self, x):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        bnres.fold(Refuses().eval(), batch(2, 3, 4, 4))
