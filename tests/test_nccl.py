"""Tests synchronised batch norm in a group with one rank: NCCL on a GPU, gloo on the CPU."""

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import bnres
from bnres.functional import batch_norm_act, sync_batch_norm_act
from bnres.operations import sync_batch_norm_act as operation
from tests.device import DEVICE
from tests.ranks import free_port
from tests.tolerances import assert_close


@pytest.fixture(scope="module", autouse=True)
def group():
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def collectives(monkeypatch):
    """Makes the group's size seem to be 2, because plain batch norm runs in a group with one rank.

    Returns a list that gets the shape of each tensor that all_gather sends.
    """
    sent, all_gather = [], operation.all_gather

    def gather(t, name):
        sent.append(tuple(t.shape))
        return all_gather(t, name)

    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(operation, "all_gather", gather)
    return sent


# The interpreter is slow, so the CPU gets a small tensor.
SHAPE = (16, 64, 14, 14) if DEVICE == "cuda" else (2, 64, 3, 3)


def draw():
    x = torch.randn(SHAPE, device=DEVICE).bfloat16()
    return x.contiguous(memory_format=torch.channels_last)


def step(bn, x, dy):
    """Returns y and the gradients of x and the parameters."""
    bn.zero_grad()
    given = x.detach().requires_grad_()
    y = bn(given)
    y.backward(dy)
    return y, given.grad, bn.weight.grad, bn.bias.grad


def test_equals_batch_norm(collectives):
    found = []
    for function, options in ((sync_batch_norm_act, {}), (batch_norm_act, {"training": True})):
        torch.manual_seed(0)
        x, residual, dy = draw(), draw(), draw()
        weight, bias = torch.rand(2, 64, device=DEVICE)
        buffers = torch.zeros(64, device=DEVICE), torch.ones(64, device=DEVICE)
        leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
        y = function(x, *buffers, weight, bias, residual=residual, act="relu", **options)
        found.append([y, *torch.autograd.grad(y, leaves, dy), *buffers])
    assert collectives == [(3, 64), (2, 64)]
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected.double(), actual.dtype)


def test_the_host_reads_no_value(route, collectives):
    # Fake tensors have no values, so an operation such as item(), which reads a value, raises.
    with FakeTensorMode():
        bn, x = bnres.nn.SyncBatchNormAct(64, device=DEVICE), draw()
        step(bn, x, torch.empty_like(x))
        # Backward on the ATen route makes a reduce_scatter instead of an all_gather.
        assert collectives == [(3, 64), (2, 64)][: 1 if bnres.backend() == "aten" else 2]
        with pytest.raises(DataDependentOutputException):
            x.sum().item()


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_cuda_graph(collectives):
    torch.manual_seed(0)
    bn, x, dy = bnres.nn.SyncBatchNormAct(64).cuda(), draw(), draw()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = step(bn, x, dy)
    torch.cuda.synchronize()
    collectives.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = step(bn, x, dy)
    assert collectives == [(3, 64), (2, 64)]
    graph.replay()
    assert all(map(torch.equal, found, expected))


def test_cpu_tensors_on_nccl(monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda group=None: "nccl")
    with pytest.raises(ValueError, match=r"backend nccl, which does not support CPU tensors"):
        sync_batch_norm_act(torch.randn(2, 3), None, None)
