"""fuse: what each condition of the pass over captured graphs is for, one small module each."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnres
from benchmarks.torchvision_import import torchvision
from tests.device import DEVICE

ROUTES = ["triton"] if DEVICE == "cuda" else ["aten", "triton-interpreter"]


class Norms(nn.Module):
    """Two convolutions and two batch norms for a forward that a test defines."""

    def __init__(self, forward, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.bn, self.bn2 = norm(4), norm(4)
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


def outcome(model, x):
    """A call's outputs, gradients and buffers."""
    x = x.clone().requires_grad_()
    out = model(x)
    out = out if isinstance(out, tuple) else (out,)
    torch.cat([t.square().flatten() for t in out]).sum().backward()
    return [*out, x.grad, *[p.grad for p in model.parameters()], *model.buffers()]


def check(forward, patterns, reason="", norm=nn.BatchNorm2d, change=lambda model: None):
    """Both compute the same by every route, and the batch norms are fused with what they are to be."""
    torch.manual_seed(0)
    stock = Norms(forward, norm).to(DEVICE).double()
    change(stock)
    x = torch.randn(3, 4, 3, 3, dtype=torch.float64, device=DEVICE)
    before = copy.deepcopy(stock.state_dict())
    for route in ROUTES:
        stock.load_state_dict(before)
        stock.zero_grad()
        fused = bnres.fuse(stock)
        with bnres.use_backend(route):
            for actual, expected in zip(outcome(fused, x), outcome(stock, x), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)
            stock.load_state_dict(before)
            sites = bnres.explain(stock, x).sites
        assert [site.pattern for site in sites] == patterns
        assert any(reason in site.reason for site in sites)


def test_frozen_batch_norms_are_computed_before_their_input_is_written():
    def forward(self, x):
        x = self.conv(x)
        y = self.bn(x)
        x.mul_(2)
        return F.relu(y) + self.bn2(x)

    check(forward, ["-", "bn-add"], norm=torchvision.ops.FrozenBatchNorm2d)


def nested(self, x):
    def inner(x):
        return F.relu(self.bn(self.conv(x)))

    return checkpoint(inner, x, use_reentrant=False)


def test_checkpoints_in_a_checkpoint():
    """Backward calls their batch norms again, which count it."""

    def forward(self, x):
        return checkpoint(lambda x: nested(self, x) + self.bn2(x), x, use_reentrant=False)

    check(forward, ["conv-bn-act", "bn-add"])


def test_an_argument_of_a_checkpoint_that_is_written_afterwards():
    def forward(self, x):
        x = self.conv(x)
        y = nested(self, x)
        x.mul_(2)
        return y

    stock = Norms(forward).to(DEVICE)
    x = torch.randn(3, 4, 3, 3, device=DEVICE)
    for model in (stock, bnres.fuse(stock)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            model(x).sum().backward()


def test_a_bias_that_is_written_afterwards():
    """Our backward reads it; torch's own does not."""

    def forward(self, x):
        y = F.relu(F.relu(self.bn(x)) + self.bn2(x))
        with torch.no_grad():
            self.bn.bias += 1
        return y

    check(forward, ["-", "bn-add-act"], "its bias is written in place afterwards")


def test_two_batch_norms_of_one_tensor_between_each_others_ends():
    def forward(self, x):
        y, z = self.bn(x), self.bn2(x)
        return F.silu(y), F.silu(z)

    check(forward, ["bn-act", "bn-act"])


def test_a_batch_norm_called_twice():
    def forward(self, x):
        return F.relu(self.bn(F.relu(self.bn(x))))

    check(forward, ["bn-act", "-"])
