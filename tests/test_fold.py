"""fold: the same outputs without the batch norms that follow convolutions."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import bnres
from bnres import models, use_backend, use_conv_route
from bnres.models.layers import stock_norm_act
from tests.device import DEVICE
from tests.test_fuse import ARCHITECTURES, build
from tests.tolerances import assert_close

ATEN = "triton" if DEVICE == "cuda" else "aten"
# Batch norms that stand in front of what could take them in.
KEPT = {"densenet121": 62}


def with_statistics(model):
    """Running statistics and parameters as training leaves them, not as it finds them."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("name", [name for name, *_ in ARCHITECTURES])
def test_architectures(name):
    stock = with_statistics(build(name)).double()
    folded = bnres.fold(stock)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, device=DEVICE)
    with torch.no_grad(), use_backend(ATEN):
        expected = stock(x)
        assert (folded(x) - expected).abs().max() <= 1e-9 * max(1, expected.abs().max())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == KEPT.get(name, 0)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in stock.modules()) > 0


@pytest.mark.parametrize("name", ["resnet18", "resnet18-seed", "lenet-seed"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "stock"])
def test_our_models(name, fused):
    torch.manual_seed(0)
    stock = models.create_model(name, num_classes=5, in_channels=1, fused=False).to(DEVICE)
    given = models.create_model(name, num_classes=5, in_channels=1, fused=fused).to(DEVICE)
    given.load_state_dict(with_statistics(stock).state_dict())
    folded = bnres.fold(given.eval())
    x = torch.randn(2, 1, 28, 28, device=DEVICE)
    with torch.no_grad(), use_backend(ATEN):
        torch.testing.assert_close(folded(x), stock(x), rtol=1e-4, atol=1e-4)


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


def test_what_can_not_be_folded():
    shared = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(
        nn.Sequential(shared, nn.BatchNorm2d(3)),
        nn.Sequential(shared, nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False)),
    )
    model = model.to(DEVICE).double().eval()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=DEVICE)
    folded = bnres.fold(model)
    torch.testing.assert_close(folded(x), model(x))
    assert [isinstance(stage[1], nn.Identity) for stage in folded] == [False, False, False, True]


class Shares(nn.Module):
    """Convolutions and batch norms that are called more than once."""

    def __init__(self):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.a(self.conv(x)).relu() + self.a(self.other(x))
        return self.conv(y) + self.b(self.other(y))


def test_what_is_called_more_than_once_is_kept():
    model = with_statistics(Shares().to(DEVICE)).double()
    folded = bnres.fold(model)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(folded(x), model(x))
    assert isinstance(folded.a, nn.BatchNorm2d) and isinstance(folded.b, nn.BatchNorm2d)


def test_folded_models_are_of_torchs_own_modules():
    stock = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    stock = with_statistics(stock.to(DEVICE))
    folded = bnres.fold(stock)
    assert [type(module) for module in folded] == [nn.Conv2d, nn.Identity, nn.ReLU]
    assert type(folded) is nn.Sequential and folded[2] is not stock[2]
    x = torch.randn(2, 8, 3, 3, device=DEVICE)
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
    with pytest.raises(ValueError, match="model must be in eval mode"):
        bnres.fold(model)
    model.eval().layer1[0].bn1.train()
    with pytest.raises(ValueError, match=r"layer1\.0\.bn1 is in training mode"):
        bnres.fold(model)
