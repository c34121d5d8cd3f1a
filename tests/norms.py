"""Small models with two batch norms, and a check that their fused copies compute the same."""

import copy

import pytest
import torch
from torch import nn

import bnres
from tests.device import DEVICE
from tests.recorded_sites import recorded_sites
from tests.steps import outcome

ROUTES = ["triton"] if DEVICE == "cuda" else ["aten", "triton-interpreter"]


class Norms(nn.Module):
    """Two convolutions and two batch norms. ``body`` is the forward."""

    def __init__(self, body, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.bn, self.bn2 = norm(4), norm(4)
        self.register_buffer("counts", torch.zeros(4, dtype=torch.int64))
        self.body = body

    def forward(self, x):
        return self.body(self, x)


class Cases(list):
    """A list of test cases. A case has a forward of `Norms` and the other arguments of `check`."""

    def add(self, *patterns, reason="", grad=True):
        """Returns a decorator that adds a forward to the list, with the arguments given here."""

        def decorate(forward):
            case = {"forward": forward, "patterns": list(patterns), "reason": reason, "grad": grad}
            self.append(pytest.param(case, id=forward.__name__))
            return forward

        return decorate


def stock_norms(forward, norm=nn.BatchNorm2d):
    """Drops Dynamo's graphs. Returns `Norms` in fp64 with random parameters and statistics."""
    # Otherwise Dynamo would treat a size as dynamic if an earlier test had used another size.
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Norms(forward, norm).to(DEVICE).double()
    for bn in (model.bn, model.bn2):
        for t in (*bn.parameters(), *bn.buffers()):
            if t.is_floating_point():
                t.data.uniform_(0.5, 1.5)
    return model


def images(count=3, size=3):
    generator = torch.Generator(DEVICE).manual_seed(1)
    shape = count, 4, size, size
    return torch.randn(shape, dtype=torch.float64, device=DEVICE, generator=generator)


def check(forward, patterns, reason="", norm=nn.BatchNorm2d, tolerance=1e-7, grad=True):
    """Compares `Norms` with its fused copy on each of ROUTES.

    Args:
        forward: the forward of `Norms`.
        patterns: the expected `Site.pattern` of each call of a batch norm.
        reason: a text that `Site.reason` of at least one of these calls must contain.
        norm: the class of the batch norms.
        tolerance: the allowed relative and absolute error.
        grad: whether gradients are computed.
    """
    stock, x = stock_norms(forward, norm), images()
    before = copy.deepcopy(stock.state_dict())
    for route in ROUTES:
        stock.load_state_dict(before)
        fused = bnres.fuse(stock)
        with (
            torch.set_grad_enabled(grad),
            bnres.use_backend(route),
            recorded_sites() as sites,
        ):
            for actual, expected in zip(outcome(fused, x), outcome(stock, x), strict=True):
                torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        assert [site.pattern for site in sites] == patterns
        assert not reason or any(reason in site.reason for site in sites)
