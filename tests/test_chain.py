"""Tests that blocks compute the same whether they pass one tensor or two to the next block.

A block can return its output as two tensors that share memory: one for each of the two modules that
read the output. Then the block's backward adds the two gradients, and autograd does not.
"""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint_sequential

from bnres.models import Residual, resnet18
from bnres.models.blocks import BasicBlock, Bottleneck
from bnres.models.chain import Chain
from bnres.nn import BatchNormActMaxPool2d
from tests.captured import capture, recorder
from tests.device import DEVICE
from tests.steps import outcome
from tests.tolerances import assert_close

if not torch.cuda.is_available():
    from benchmarks.audit.step import no_launches


def net(dtype=torch.float64):
    """A model with a stem and every kind of block."""
    torch.manual_seed(0)
    stem = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), BatchNormActMaxPool2d(4, 3, 2, 1), nn.Identity()
    )
    blocks = nn.Sequential(BasicBlock(4, 8, 2), Residual(8, 8))
    model = Chain(stem, blocks, Chain(Bottleneck(8, 2)))
    return model.to(DEVICE, dtype).to(memory_format=torch.channels_last)


def images(dtype=torch.float64):
    return torch.randn(2, 2, 8, 8, dtype=dtype, device=DEVICE)


def in_sequence(model):
    """Returns a copy of ``model`` in which no module gets or returns two tensors."""
    return nn.Sequential(*(nn.Sequential(*stage) for stage in copy.deepcopy(model)))


def forks(y):
    """Returns how many fused operations in the autograd graph of ``y`` have two used outputs."""
    found, seen, nodes = Counter(), set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, index in node.next_functions:
            if "Fused" in type(following).__name__:
                found[following] |= 1 << index
            nodes.append(following)
    return sum(outputs == 3 for outputs in found.values())


def assert_same(model, expected, x):
    """Checks that both models' outputs, gradients and buffers agree within the tolerance."""
    for ours, theirs in zip(outcome(model, x), outcome(expected, x), strict=True):
        assert_close(ours, theirs, x.dtype)


def test_blocks_pass_two_tensors():
    model, x = net(torch.float32), images(torch.float32)  # the pooling kernel has no fp64
    assert forks(model(x)) == 3
    assert forks(in_sequence(model)(x)) == 0
    assert_same(model, in_sequence(model), x)


def test_compiled_gradients_equal_eager_gradients():
    model, x = net(torch.float32), images(torch.float32)
    compiled, _ = capture(copy.deepcopy(model))
    for eager, ours in zip(outcome(model, x), outcome(compiled, x), strict=True):
        assert torch.equal(eager, ours)


@pytest.mark.skipif(torch.cuda.is_available(), reason="skips the interpreter's launches")
@pytest.mark.parametrize(
    ("fused", "hooked", "count"),
    [
        (True, (), 0),
        (False, (), 0),
        # A block with a hook gets and returns one tensor instead of two. So autograd adds the two
        # gradients of the block's input, and the two gradients of the block's output.
        pytest.param(True, ["layer2.0"], 2, marks=pytest.mark.slow),
        pytest.param(True, ["layer2.0", "layer4"], 3, marks=pytest.mark.slow),
    ],
    ids=["layers", "graph", "block", "stage"],
)
def test_number_of_gradient_additions_outside_the_operations(fused, hooked, count):
    model = resnet18(fused=fused).to(memory_format=torch.channels_last)
    for name in hooked:
        model.get_submodule(name).register_forward_hook(lambda module, args, y: None)
    record, graphs = recorder()
    inner = aot_autograd(fw_compiler=record, bw_compiler=record)
    through = {"backend": inner} if fused else {"backend": "bnres", "options": {"inner": inner}}
    compiled = torch.compile(model, fullgraph=True, **through)
    with no_launches():
        compiled(torch.randn(2, 3, 32, 32)).sum().backward()
    _, backward = graphs
    added = [
        node
        for node in backward.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
        if node.meta["val"].dim() == 4
    ]
    assert len(added) == count


@pytest.mark.parametrize(
    "name",
    [
        *("0.1", "1.0", "1.1.bn2", "2.0.bn3"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "0",
                "0.2",
                "1",
                "1.0.act2",
                "1.0.bn2",
                "1.0.downsample.0",
                "1.1.conv1",
                "2",
            )
        ),
    ],
)
def test_a_hooked_tensor_gets_its_whole_gradient(name):
    model, x = net(), images()
    found = []
    for m in (model, in_sequence(model)):
        seen = []
        module = m.get_submodule(name)
        module.register_forward_pre_hook(lambda module, args, seen=seen: seen.extend(args))
        module.register_forward_hook(lambda module, args, y, seen=seen: seen.append(y))
        y = m(x)
        watched = [t for t in seen if t.requires_grad]
        found.append(torch.autograd.grad(y.square().mean(), watched, retain_graph=True))
        for t in watched:
            t.retain_grad()
        y.square().mean().backward()
        found.append([t.grad for t in watched])
    assert len(found[0]) > 0
    for others in found[1:]:
        for ours, theirs in zip(found[0], others, strict=True):
            assert_close(ours, theirs, torch.float64)


@pytest.mark.parametrize(
    "name",
    ["1", "1.1.conv1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("0.1", "1.0"))],
)
def test_hooks_that_replace_tensors(name):
    model, x = net(), images()
    expected = in_sequence(model)
    for m in (model, expected):
        module = m.get_submodule(name)
        module.register_forward_pre_hook(lambda module, args: args[0].sin())
        module.register_forward_hook(lambda module, args, y: y.cos())
    assert_same(model, expected, x)


class Mine(BasicBlock):
    """A user's block that writes to its input."""

    def forward(self, x):
        return super().forward(x.mul_(2))


class InPlace(nn.Conv2d):
    """A user's convolution that writes to its input."""

    def forward(self, x):
        return super().forward(x.mul_(2))


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("0.2", lambda: nn.LeakyReLU(inplace=True)),
        ("1.0", lambda: Mine(4, 8, 2)),
        ("1.1", lambda: nn.Hardtanh(0, 0.5, inplace=True)),
        ("1.1.conv1", lambda: InPlace(8, 8, 3, padding=1)),
        ("1.0.act2", nn.Softplus),
    ],
    ids=["after the stem", "subclass", "in place of a block", "convolution", "activation"],
)
def test_modules_of_the_user(name, module):
    model, x = net(), images()
    model.set_submodule(name, module().to(DEVICE, torch.float64))
    assert_same(model, in_sequence(model), x)


@pytest.mark.parametrize(
    "name", ["1.0", *(pytest.param(name, marks=pytest.mark.slow) for name in ("1", "2"))]
)
def test_compiled_module_is_called(name):
    model, x = net(), images()
    expected, (record, graphs) = in_sequence(model), recorder()
    model.get_submodule(name).compile(backend=record)
    assert_same(model, expected, x)
    assert graphs


def test_checkpointed_stages():
    model, x = net(), images()
    eager, kept = model(x), checkpoint_sequential(model, 3, x, use_reentrant=False)
    for ours, theirs in zip(
        *(torch.autograd.grad(y.sum(), [*model.parameters()]) for y in (eager, kept)), strict=True
    ):
        assert_close(ours, theirs, torch.float64)
