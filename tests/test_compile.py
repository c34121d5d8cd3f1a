"""torch.compile captures the layers whole: our operators in the graph, no batch norm of ATen's."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.library import opcheck

from bnres.models import resnet18
from bnres.nn import BatchNorm2d, BatchNormAct2d, BatchNormActMaxPool2d
from tests.compiled import run_compiled
from tests.device import DEVICE


class Net(nn.Module):
    """A block with every kind of call: cumulative average, activation, residual, dual, pooled."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = BatchNormAct2d(8, momentum=None)
        self.bn2 = BatchNormAct2d(8, act_layer="silu")
        self.bn3 = BatchNorm2d(8)
        self.bn4 = BatchNormAct2d(8)
        self.bn5 = BatchNormActMaxPool2d(8, 3, 2, 1)

    def forward(self, x):
        y = self.bn1(self.conv(x))
        y, skip = self.bn4(self.bn2(y, y), y, residual_norm=self.bn3, twice=True)
        return self.bn5(y + skip)


def names(graphs):
    return " ".join(
        f"{node.target} {node.args[0] if 'auto_functionalized' in str(node.target) else ''}"
        for graph in graphs
        for node in graph.graph.nodes
        if node.op == "call_function"
    )


def test_training_step_is_captured_whole():
    torch.manual_seed(0)
    graphs = []

    def record(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    net = Net().to(DEVICE)
    eager = copy.deepcopy(net)
    compiled = torch.compile(
        net, backend=aot_autograd(fw_compiler=record, bw_compiler=record), fullgraph=True
    )
    x = torch.randn(2, 3, 6, 6, device=DEVICE)
    results = []
    for model in (compiled, eager):
        y = model(x)
        y.square().sum().backward()
        results.append(y)
    assert torch.equal(*results)
    for ours, theirs in zip(net.parameters(), eager.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    for ours, theirs in zip(net.buffers(), eager.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    found = names(graphs)
    for direction in ("forward", "backward"):
        assert found.count(f"bnres.batch_norm_act_{direction}") == 2
        assert found.count(f"bnres.dual_batch_norm_act_{direction}") == 1
        assert found.count(f"bnres.batch_norm_act_max_pool_{direction}") == 1
    assert "aten.native_batch_norm" not in found
    assert "aten._native_batch_norm" not in found


def test_dynamic_batch_and_inductor():
    torch.manual_seed(0)
    net = Net().to(DEVICE)
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    for n in (2, 3, 5):
        x = torch.randn(n, 3, 6, 7, device=DEVICE)
        net.eval()
        assert torch.allclose(compiled(x), net(x), rtol=1e-5, atol=1e-5)


def test_operators_pass_opcheck():
    from bnres.ops import (
        batch_norm_act,
        batch_norm_act_max_pool,
        conv2d_batch_norm_act,
        dual_batch_norm_act,
    )

    def check(ops, forward, backward=()):
        """The forward operator, and the backward one on what the forward returns."""
        checks = ("test_schema", "test_faketensor")
        opcheck(ops.forward_op, forward, test_utils=checks)
        if backward:
            outputs = ops.forward_impl(*forward)
            opcheck(ops.backward_op, backward(*outputs), test_utils=checks)

    x, weight = torch.randn(4, 3, 2, 2, device=DEVICE), torch.rand(3, device=DEVICE)
    mean, var = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    counter = torch.tensor(0, device=DEVICE)
    check(
        batch_norm_act,
        (x, weight, None, x.clone(), mean, var, counter, None, 0.1, True, 1e-5, "relu", 0.0,
         True),
        lambda y, mean, rstd, mask: (
            y, y.clone(), x, weight, None, None, mean, rstd, mask, True, "relu", 0.0, True, True,
            True,
        ),
    )  # fmt: skip
    check(
        dual_batch_norm_act,
        (
            x, weight, None, x.clone(), None, weight.clone(), mean, var, counter, None,
            mean.clone(), var.clone(), counter.clone(), None, 0.1, 0.1, 1e-5, 1e-5, True, "relu", 0.0, True,
        ),
        lambda y, *statistics: (
            y, None, x, weight, None, x.clone(), None, weight.clone(), *statistics, True, "relu",
            0.0, True, True,
        ),
    )  # fmt: skip
    window = [2, 2, 1, 1, 0, 0, 1, 1]
    last = x.contiguous(memory_format=torch.channels_last)
    check(
        batch_norm_act_max_pool,
        (last, weight, None, mean, var, counter, None, 0.1, True, 1e-5, "relu", 0.0, window, False,
         True),
        lambda y, index, x_max, mean, rstd: (
            y, last, weight, None, index, x_max, mean, rstd, True, "relu", 0.0, window, True, True
        ),
    )  # fmt: skip
    filter = torch.randn(3, 3, 1, 1, device=DEVICE)
    conv = [1, 1, 1, 1, 0, 0, 1, 1]
    check(
        conv2d_batch_norm_act,
        (
            last, filter, None, mean, var, weight, None, last.clone(), 1e-5, "relu", 0.0, conv,
            None,
        ),
    )  # fmt: skip


def capture_on_fake_gpu():
    """A ResNet-18 of fake CUDA tensors, captured whole; prints the operators of its graph."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    graphs = []

    def record(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    with FakeTensorMode():
        net = resnet18(10)

        def on_gpu(t):
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")

        # A CPU build of torch has no gradients for CUDA tensors, fake ones included.
        parameters = {name: on_gpu(p) for name, p in net.named_parameters()}
        for module in net.modules():
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = on_gpu(buffer)
        x = torch.empty(4, 3, 32, 32, device="cuda", memory_format=torch.channels_last)
        compiled = torch.compile(
            lambda parameters, x: torch.func.functional_call(net, parameters, (x,)),
            backend=record,
            fullgraph=True,
        )
        assert compiled(parameters, x).device.type == "cuda"
    print(names(graphs))


def test_fake_gpu_model_is_captured_whole():
    result = run_compiled("-c", "from tests.test_compile import *; capture_on_fake_gpu()")
    assert result.stdout.count("bnres.") == 17, result.stderr
    assert "batch_norm.default" not in result.stdout
    assert "native_batch_norm" not in result.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_cuda_graph_replays_training_forward():
    torch.manual_seed(0)
    bn = BatchNormAct2d(8, momentum=None).cuda()
    x = torch.randn(4, 8, 6, 6, device="cuda")
    bn(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = bn(x)
    before = bn.num_batches_tracked.item()
    graph.replay()
    assert bn.num_batches_tracked.item() == before + 1
    torch.testing.assert_close(y, copy.deepcopy(bn)(x))
