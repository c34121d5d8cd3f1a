"""Tests that with `bnres.recompute` forward saves fewer bytes, and gradients stay bit-equal."""

import copy

import pytest
import torch
from torch import nn

import bnres
from bnres import models
from bnres.models.blocks import BasicBlock
from tests.device import DEVICE

SHAPE = (256, 3, 224, 224)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(BasicBlock(4, 6, 2), BasicBlock(6, 6), BasicBlock(6, 6)).to(DEVICE)


def gradients(net, x):
    net.zero_grad()
    with torch.random.fork_rng():
        net(x).sin().sum().backward()
    return [p.grad for p in net.parameters()]


def test_gradients_are_bit_equal(net, monkeypatch):
    from bnres.kernels import bn_forward

    x = torch.randn(3, 4, 6, 6, device=DEVICE, requires_grad=True)
    twin = copy.deepcopy(net)
    expected = gradients(net, x)
    made = []
    original = bn_forward.bn_apply

    def record(x, norm, residual, residual_norm, *options, **named):
        made.append("one norm" if residual_norm is None else "two norms")
        return original(x, norm, residual, residual_norm, *options, **named)

    monkeypatch.setattr(bn_forward, "bn_apply", record)
    with bnres.recompute():
        y = twin(x).sin().sum()
    forward = len(made)
    y.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(twin.parameters(), expected, strict=True))
    # Backward recomputes the output of each block's first norm, and the outputs of the first and
    # third block. The output of the second block is stored, because its residual is recomputed.
    assert sorted(made[forward:]) == ["one norm"] * 4 + ["two norms"]


def test_in_place_writes_to_saved_tensors_raise(net):
    x = torch.randn(3, 4, 6, 6, device=DEVICE)
    with bnres.recompute():
        loss = net(x).sum()
    with torch.no_grad():
        net[2].bn1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("momentum", [0.1, None], ids=["one graph", "broken graph"])
def test_compiled(momentum):
    torch.manual_seed(0)
    stock = nn.Sequential(
        nn.Conv2d(2, 3, 1),
        nn.BatchNorm2d(3, momentum=momentum),
        nn.ReLU(),
        nn.Conv2d(3, 2, 1),
    ).to(DEVICE, torch.float64)
    fused, inside = bnres.fuse(stock), copy.deepcopy(stock)

    @torch.compile(backend="bnres")
    def compiled(x):
        with bnres.recompute():
            return inside(x)

    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, device=DEVICE)
    expected = gradients(stock, x)
    with bnres.recompute():
        y = fused(x).sin().sum()
    y.backward()
    torch.testing.assert_close([p.grad for p in fused.parameters()], expected)
    compiled(x).sin().sum().backward()
    torch.testing.assert_close([p.grad for p in inside.parameters()], expected)


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what interpreted launches would save")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bytes_saved_for_a_resnet18_step(dtype):
    from benchmarks.audit.step import held_bytes

    eager = held_bytes(lambda: models.resnet18(fused=False), SHAPE, dtype)
    fused = held_bytes(models.resnet18, SHAPE, dtype)
    recomputed = held_bytes(models.resnet18, SHAPE, dtype, recomputes=True)
    print(f"{dtype}: eager {eager}, fused {fused}, recomputed {recomputed}")
    assert fused <= 0.85 * eager
    assert recomputed <= 0.85 * fused
    assert recomputed <= 0.65 * eager
