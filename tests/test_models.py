"""Tests that models have torchvision's keys and results, whether they are fused or stock."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.sites import RESNET18_SITES
from benchmarks.torchvision_import import torchvision
from bnres import models, use_backend
from bnres.models.layers import fused_norm_act, stock_norm_act
from bnres.nn import BatchNormAct2d
from tests.device import DEVICE


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "stock"])
def test_state_dict_has_torchvisions_keys_and_shapes(name, fused):
    with torch.device("meta"):
        ours = getattr(models, name)(fused=fused).state_dict()
        theirs = getattr(torchvision.models, name)().state_dict()
    assert list(ours) == list(theirs)
    assert [v.shape for v in ours.values()] == [v.shape for v in theirs.values()]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_logits_and_gradients_equal_torchvisions(name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=10).to(DEVICE, torch.float64)
    ours = getattr(models, name)(num_classes=10).to(DEVICE, torch.float64)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(4, 3, 64, 64, device=DEVICE, dtype=torch.float64)
    with use_backend("triton" if DEVICE == "cuda" else "aten"):
        for model in (ours, theirs):
            F.cross_entropy(model(x), torch.arange(4, device=DEVICE)).backward()
        for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            scale = max(q.grad.abs().max().item(), 1.0)
            assert (p.grad - q.grad).abs().max() <= 1e-10 * scale, key
        with torch.no_grad():
            logits, expected = ours.eval()(x), theirs.eval()(x)
    assert (logits - expected).abs().max() <= 1e-12 * max(1.0, expected.abs().max().item())


@pytest.mark.slow
def test_interpreted_resnet18_has_torchvisions_logits():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=10).to(DEVICE).eval()
    ours = models.resnet18(num_classes=10).to(DEVICE).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32, device=DEVICE)
    with torch.no_grad():
        logits, expected = ours(x), theirs(x)
    assert (logits - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet18-seed", "lenet-seed"])
def test_fused_and_stock_models_start_with_the_same_weights(name):
    nets = []
    for fused in (True, False):
        torch.manual_seed(1)
        nets.append(models.create_model(name, num_classes=10, in_channels=1, fused=fused))
    for (k, p), (j, q) in zip(*(n.state_dict().items() for n in nets), strict=True):
        assert k == j and torch.equal(p, q)
    # The models run in fp64, because the last batch norms normalise only two values per channel,
    # which magnifies rounding errors.
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    with use_backend("aten"):
        ours, stock = (n.double()(x) for n in nets)
    torch.testing.assert_close(ours, stock, rtol=1e-9, atol=1e-9)


def test_every_activation_and_addition_is_fused():
    net = models.resnet18()
    assert not any(isinstance(m, nn.ReLU) for m in net.modules())
    assert sum(isinstance(m, BatchNormAct2d) for m in net.modules()) == 20
    stock = models.resnet18(fused=False)
    assert {type(m) for m in stock.modules() if isinstance(m, nn.BatchNorm2d)} == {nn.BatchNorm2d}


def test_sites_of_the_audit_match_the_model():
    found = []
    with torch.device("meta"):
        net = models.resnet18(fused=False).eval()
        for name, module in net.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(
                    lambda m, i, o, name=name: found.append((name, *o.shape[1:3]))
                )
        net(torch.empty(1, 3, 224, 224))
    counts = {}
    for name, channels, size in found:
        stage = name.split(".")[0].replace("bn1", "stem")
        kind = "bn" if "downsample" in name else "bn_add_relu" if "bn2" in name else "bn_relu"
        counts[stage, kind, channels, size] = counts.get((stage, kind, channels, size), 0) + 1
    assert counts == {(s.name, s.operation, s.channels, s.size): s.count for s in RESNET18_SITES}


def test_options():
    net = models.resnet18(10, 3, stem="cifar", act="silu", zero_init_residual=True)
    assert net.conv1.kernel_size == (3, 3) and isinstance(net.maxpool, nn.Identity)
    assert net.layer1[0].bn2.weight.abs().max() == 0
    assert net.layer1[0].bn1.weight.min() == 1
    with pytest.raises(ValueError, match="stem must be one of imagenet, cifar, got 'x'"):
        models.resnet18(stem="x")
    with pytest.raises(ValueError, match="act must be one of"):
        models.resnet18(act="mish")


class Small(nn.Module):
    """A small residual net with a down-sample block, fused or stock."""

    def __init__(self, fused):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        norm_act = fused_norm_act if fused else stock_norm_act
        self.block = models.blocks.BasicBlock(4, 6, 2, norm_act)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.block(self.stem(x)).mean((2, 3)))


def pair(dtype):
    torch.manual_seed(2)
    stock = Small(fused=False).to(DEVICE, dtype)
    fused = Small(fused=True).to(DEVICE, dtype)
    fused.load_state_dict(stock.state_dict())
    return fused, stock


def step(net, x, labels, optimizer=None):
    net.zero_grad()
    loss = F.cross_entropy(net(x), labels)
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    return loss.item()


def batch(dtype):
    return (
        torch.randn(3, 1, 4, 4, dtype=dtype, device=DEVICE),
        torch.randint(3, (3,), device=DEVICE),
    )


@pytest.mark.slow
def test_fifty_steps_in_fp64_equal_the_stock_models():
    fused, stock = pair(torch.float64)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.05, momentum=0.9) for n in (fused, stock)]
    for _ in range(50):
        x, labels = batch(torch.float64)
        losses = [step(n, x, labels, o) for n, o in zip((fused, stock), optimizers, strict=True)]
        assert abs(losses[0] - losses[1]) <= 1e-8
    for p, q in zip(fused.state_dict().values(), stock.state_dict().values(), strict=True):
        assert (p - q).abs().max() <= 1e-8


@pytest.mark.slow
def test_each_of_twenty_steps_in_fp32_equals_the_stock_models():
    fused, stock = pair(torch.float32)
    optimizer = torch.optim.SGD(stock.parameters(), lr=0.05, momentum=0.9)
    for _ in range(20):
        fused.load_state_dict(copy.deepcopy(stock.state_dict()))
        x, labels = batch(torch.float32)
        losses = step(fused, x, labels), step(stock, x, labels, optimizer)
        assert abs(losses[0] - losses[1]) <= 1e-5
        for p, q in zip(fused.parameters(), stock.parameters(), strict=True):
            assert (p.grad - q.grad).abs().max() <= 1e-4
