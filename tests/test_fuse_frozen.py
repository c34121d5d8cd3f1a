"""Tests fusing frozen batch norms that call F.batch_norm or are written as plain arithmetic."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnres
from benchmarks.torchvision_import import torchvision
from tests.norms import ROUTES, check, images, stock_norms


class Frozen(nn.Module):
    """Like detectron2's FrozenBatchNorm2d."""

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        if x.requires_grad:
            scale = self.weight * (self.running_var + 1e-5).rsqrt()
            bias = self.bias - self.running_mean * scale
            scale, bias = scale.reshape(1, -1, 1, 1), bias.reshape(1, -1, 1, 1)
            return x * scale.to(x.dtype) + bias.to(x.dtype)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, eps=1e-5
        )


def held_bytes(model, x):
    """Returns how many bytes of memory a forward saves for backward."""
    sizes = {}

    def note(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    model(x)  # the first call captures the graph
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = model(x)
    del y
    return sum(sizes.values())


def block(self, x):
    return F.relu(self.bn2(self.conv2(F.relu(self.bn(self.conv(x))))) + x)


@pytest.mark.parametrize("cls", [torchvision.ops.FrozenBatchNorm2d, Frozen])
def test_frozen_norms(cls):
    check(block, ["conv-bn-act", "conv-bn-add-act"], norm=cls)
    stock, x = stock_norms(block, cls), images(size=16)
    fused = bnres.fuse(stock)
    for route in ROUTES:
        with bnres.use_backend(route):
            # The fused model saves slightly more than the stock model, because it also saves the
            # statistics and, with kernels, one bit per element.
            assert held_bytes(fused, x) < 1.05 * held_bytes(stock, x)


def arithmetic(x, bn, eps=1e-5, shape=(1, -1, 1, 1), weight=None):
    """Computes what torchvision's FrozenBatchNorm2d computes."""
    w = (bn.weight if weight is None else weight).reshape(*shape)
    b = bn.bias.reshape(*shape)
    rv, rm = bn.running_var.reshape(*shape), bn.running_mean.reshape(*shape)
    scale = w * (rv + eps).rsqrt()
    bias = b - rm * scale
    return x * scale + bias


def five_dimensions(self, x):
    return arithmetic(x[:, :, None].expand(3, 4, 4, 3, 3), self.bn)


def input_of_another_dtype(self, x):
    return arithmetic(x.float(), self.bn)


def eps_is_a_tensor(self, x):
    return arithmetic(x, self.bn, self.bn2.running_var.mean())


def weight_is_one_number(self, x):
    return arithmetic(x, self.bn, weight=self.bn2.weight[:1])


def rows_are_normalised(self, x):
    return arithmetic(F.pad(x, (0, 1, 0, 1)), self.bn, shape=(1, 1, -1, 1))


def number_is_scaled(self, x):
    return arithmetic(2.0, self.bn)


def variance_is_written_within(self, x):
    mean, var, weight, bias = (
        t.reshape(1, -1, 1, 1)
        for t in (self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)
    )
    scale = weight * (var + 1e-5).rsqrt()
    self.bn.running_var.mul_(2)
    return x * scale + (bias - mean * scale)


@pytest.mark.parametrize(
    "forward",
    [
        five_dimensions, input_of_another_dtype, eps_is_a_tensor, weight_is_one_number,
        rows_are_normalised, number_is_scaled, variance_is_written_within,
    ],
)  # fmt: skip
def test_arithmetic_that_is_not_a_batch_norm(forward):
    check(forward, [])


def test_a_frozen_norm_of_a_frozen_norm():
    check(lambda self, x: arithmetic(arithmetic(x, self.bn), self.bn2), ["bn", "bn"])


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_frozen_statistics_that_need_gradients(name):
    class Norm(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            setattr(self, name, nn.Parameter(self._buffers.pop(name)))

    check(lambda self, x: arithmetic(x, self.bn), [], norm=Norm)
    check(lambda self, x: arithmetic(x, self.bn), ["bn"])


def test_frozen_batch_norms_are_computed_before_their_input_is_written():
    def forward(self, x):
        x = self.conv(x)
        y = self.bn(x)
        x.mul_(2)
        return F.relu(y) + self.bn2(x)

    check(forward, ["bn", "bn-add"], norm=torchvision.ops.FrozenBatchNorm2d)
