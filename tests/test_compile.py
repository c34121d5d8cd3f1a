"""Tests that torch.compile captures layers as our operators, without graph breaks."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from bnres import use_conv_route
from bnres.models import resnet18
from bnres.nn import BatchNorm2d, BatchNormAct2d, BatchNormActMaxPool2d, ConvBatchNormAct2d
from tests.captured import capture, recorder
from tests.compiled import run_compiled
from tests.device import DEVICE
from tests.steps import outcome


class Net(nn.Module):
    """A net with cumulative statistics, residuals, a residual norm, a forked output and pooling."""

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
        y, skip = self.bn4(self.bn2(y, y), y, residual_norm=self.bn3, fork=True)
        return self.bn5(y + skip)


def names(graphs):
    return " ".join(
        f"{node.target} {node.args[0] if 'auto_functionalized' in str(node.target) else ''}"
        for graph in graphs
        for node in graph.graph.nodes
        if node.op == "call_function"
    )


def test_training_step_is_one_graph():
    torch.manual_seed(0)
    net = Net().to(DEVICE)
    eager = copy.deepcopy(net)
    compiled, graphs = capture(net)
    x = torch.randn(2, 3, 6, 6, device=DEVICE)
    for ours, theirs in zip(outcome(compiled, x), outcome(eager, x), strict=True):
        assert torch.equal(ours, theirs)
    found = names(graphs)
    for direction in ("forward", "backward"):
        assert found.count(f"bnres.batch_norm_act_{direction}") == 4
    assert "aten.native_batch_norm" not in found
    assert "aten._native_batch_norm" not in found


@pytest.mark.slow
def test_dynamic_batch_and_inductor():
    torch.manual_seed(0)
    net = Net().to(DEVICE)
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    for n in (2, 3, 5):
        x = torch.randn(n, 3, 6, 7, device=DEVICE)
        net.eval()
        assert torch.allclose(compiled(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_dynamic_sizes_in_training():
    torch.manual_seed(0)
    net = Net().to(DEVICE)
    eager = copy.deepcopy(net)
    compiled, graphs = capture(net, dynamic=True)
    for shape in [(2, 3, 6, 8), (3, 3, 8, 24), (4, 3, 4, 16)]:
        x = torch.randn(shape, device=DEVICE)
        found = outcome(compiled, x), outcome(eager, x)
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours, theirs)
    assert len(graphs) == 2  # one forward graph and one backward graph for all sizes


@pytest.mark.slow
def test_operators_pass_opcheck():
    """torch's opcheck accepts each of our operators, with the arguments of real calls."""
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "bnres":
                copies = tree_map_only(torch.Tensor, torch.clone, args)
                calls.append((op, copies))
            return op(*args, **(kwargs or {}))

    torch.manual_seed(0)
    net = Net().to(DEVICE)
    conv = ConvBatchNormAct2d(8, 8, 1, dtype=torch.float16).to(DEVICE).eval()
    x = torch.randn(2, 3, 6, 6, device=DEVICE)
    with Record():
        net(x).sum().backward()
        with torch.no_grad(), use_conv_route("kernel"):
            conv(torch.randn(2, 8, 6, 6, device=DEVICE).half())
    names = [op._opname for op, _ in calls]
    assert {name: names.count(name) for name in names} == {
        "batch_norm_act_forward": 4,
        "batch_norm_act_backward": 4,
        "conv2d_batch_norm_act_forward": 1,
    }
    for op, args in calls:
        opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_fake_tensors_outside_of_their_mode():
    with FakeTensorMode():
        x = torch.randn(2, 8, 3, 3, requires_grad=True)
        bn = BatchNormAct2d(8)
    y = bn(x, x)
    (dx,) = torch.autograd.grad(y, x, torch.empty_like(y))
    assert isinstance(y, FakeTensor) and isinstance(dx, FakeTensor)
    assert y.shape == dx.shape == x.shape


def capture_on_fake_gpu():
    """Captures a ResNet-18 of fake CUDA tensors as one graph, and prints its operators."""
    record, graphs = recorder()
    with FakeTensorMode():
        net = resnet18(10)

        def on_gpu(t):
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")

        # The parameters don't require gradients, because a CPU build of torch can't compute
        # gradients of CUDA tensors, not even of fake ones.
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


@pytest.mark.slow
def test_fake_gpu_model_is_one_graph():
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
