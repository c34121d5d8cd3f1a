"""Models for the tests of fusion, and comparisons of fused with stock models."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import bnres
from benchmarks.torchvision_import import torchvision
from bnres import models
from tests.device import DEVICE

tv = torchvision.models
BasicBlock, Bottleneck = tv.resnet.BasicBlock, tv.resnet.Bottleneck
# The tolerance of whole models. It is larger than a layer's, because rounding errors grow from
# layer to layer, most of all in the gradients of small batches.
DEEP = 1e-9


def mobilenet(**options):
    return tv.MobileNetV2(inverted_residual_setting=[[1, 8, 1, 1], [6, 16, 2, 2]], **options)


def regnet(**options):
    stages = tv.regnet.BlockParams([1, 2], [16, 32], [8, 8], [1.0, 1.0], [2, 2], 0.25)
    return tv.RegNet(stages, stem_width=16, **options)


def mobilenet_v3(**options):
    row = partial(tv.mobilenetv3.InvertedResidualConfig, dilation=1, width_mult=1.0)
    rows = [row(8, 3, 16, 8, True, "RE", 2), row(8, 5, 24, 8, True, "HS", 1)]
    return tv.MobileNetV3(rows, last_channel=32, **options)


def d2l(name, **options):
    return models.create_model(name, in_channels=3, fused=False, **options)


def of_timm(name, **options):
    import timm  # imports torchvision, so torchvision_import must have been imported before

    return timm.create_model(name, **options)


# For each name, a function that builds the model, and the model's number of batch norms.
SMALL = {
    "resnet": (partial(tv.ResNet, BasicBlock, [1, 1, 1, 1]), 12),
    "bottleneck": (partial(tv.ResNet, Bottleneck, [1, 1, 1, 1], groups=2, width_per_group=8), 17),
    "mobilenet_v2": (mobilenet, 10),
    "mobilenet_v3": (mobilenet_v3, 8),
    "densenet": (partial(tv.DenseNet, 8, (2, 2), 16), 11),
    "shufflenet": (partial(tv.ShuffleNetV2, [1, 1, 1], [8, 16, 16, 16, 32]), 17),
    "regnet": (regnet, 12),
    "lenet-seed": (partial(d2l, "lenet-seed"), 4),
    "resnet18-seed": (partial(d2l, "resnet18-seed"), 17),
    "timm-resnet": (partial(of_timm, "test_resnet"), 15),
    "timm-efficientnet": (partial(of_timm, "test_efficientnet"), 13),
    "timm-byobnet": (partial(of_timm, "test_byobnet"), 14),
}


def small_architecture(name):
    """Returns the model with this name in `SMALL`, and a batch of images for it."""
    torch.manual_seed(0)
    model = SMALL[name][0](num_classes=5).to(DEVICE).double()
    return model, batch(size=28 if "seed" in name else 48)


def small():
    """Returns a model of a stem with a max-pool, two residual blocks, and a classifier.

    The first block adds the outputs of two batch norms. The second adds its input to the output of
    a batch norm.
    """
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(4, 6, 1, stride=2, bias=False), nn.BatchNorm2d(6))
    model = nn.Sequential(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        ),
        nn.Sequential(BasicBlock(4, 6, 2, downsample=shortcut), BasicBlock(6, 6)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    )
    return model.to(DEVICE).double()


PATTERNS = [
    "conv-bn-act-pool", "conv-bn-act", "conv-bn+bn-add-act", "conv-bn+bn-add-act", "conv-bn-act",
    "conv-bn-add-act",
]  # fmt: skip


def batch(count=4, size=10):
    torch.manual_seed(1)
    return torch.randn(count, 3, size, size, dtype=torch.float64, device=DEVICE)


def patterns(model, *inputs):
    return [site.pattern for site in bnres.explain(model, *inputs).sites]


def assert_same(actual, expected, tolerance=DEEP):
    """Checks that the greatest difference is at most ``tolerance`` times a scale.

    The scale is the largest absolute expected value, or 1 if that value is below 1.
    """
    scale = max(1.0, expected.abs().max().item())
    assert (actual - expected).abs().max().item() <= tolerance * scale


def assert_same_state(fused, stock, tolerance=DEEP):
    """Checks that parameters and buffers agree within the tolerance.

    The tolerance of gradients is 100 times as large.
    """
    for p, q in zip(fused.parameters(), stock.parameters(), strict=True):
        assert_same(p, q, tolerance)
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            assert_same(p.grad, q.grad, 100 * tolerance)
    for b, c in zip(fused.buffers(), stock.buffers(), strict=True):
        if b.is_floating_point():
            assert_same(b, c, tolerance)
        else:
            assert torch.equal(b, c)


def logits(out):
    return out if isinstance(out, torch.Tensor) else out.logits


def step(model, x, rate=0.01):
    """Makes a step of SGD, with the same random numbers for all models. Returns the logits."""
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    optimizer.zero_grad()
    out = logits(model(x))
    F.cross_entropy(out, torch.arange(len(x), device=x.device) % out.shape[1]).backward()
    optimizer.step()
    return out.detach()


def assert_trains_alike(fused, stock, x, tolerance=DEEP):
    """Compares training, evaluation, training again, and a smaller last batch."""
    for batch in (x, None, x, x[:-1]):
        outputs = []
        for model in (fused, stock):
            model.train(batch is not None)
            if batch is None:
                with torch.no_grad():
                    outputs.append(logits(model(x)))
            else:
                outputs.append(step(model, batch))
        assert_same(*outputs, tolerance)
        assert_same_state(fused, stock, tolerance)
