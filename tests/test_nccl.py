"""Tests synchronised batch norm on a GPU, in an NCCL group with one rank."""

import pytest
import torch
import torch.distributed as dist

import bnres
from bnres.functional import batch_norm_act, sync_batch_norm_act
from bnres.operations import sync_batch_norm_act as operation
from tests.ranks import free_port
from tests.tolerances import assert_close

if not torch.cuda.is_available():
    pytest.skip("NCCL needs a GPU", allow_module_level=True)


class TwoRanks:
    """torch.distributed, except that ``get_world_size`` returns 2.

    If it returned 1, the operation would not synchronise.
    """

    def __getattr__(self, name):
        return getattr(dist, name)

    def get_world_size(self, group=None):
        return 2


@pytest.fixture(scope="module", autouse=True)
def group():
    dist.init_process_group("nccl", f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch):
    monkeypatch.setattr(operation, "dist", TwoRanks())


def draw():
    shape = (16, 64, 14, 14)
    x = torch.randn(shape, device="cuda").bfloat16()
    return x.contiguous(memory_format=torch.channels_last)


def test_equals_batch_norm():
    found = []
    for function, options in ((sync_batch_norm_act, {}), (batch_norm_act, {"training": True})):
        torch.manual_seed(0)
        x, residual, dy = draw(), draw(), draw()
        weight, bias = torch.rand(2, 64, device="cuda")
        buffers = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
        leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
        y = function(x, *buffers, weight, bias, residual=residual, act="relu", **options)
        found.append([y, *torch.autograd.grad(y, leaves, dy), *buffers])
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected.double(), actual.dtype)


def test_cuda_graph():
    torch.manual_seed(0)
    bn, x, dy = bnres.nn.SyncBatchNormAct(64).cuda(), draw(), draw()

    def step():
        bn.zero_grad()
        given = x.detach().requires_grad_()
        y = bn(given)
        y.backward(dy)
        return y, given.grad, bn.weight.grad, bn.bias.grad

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = step()
    graph.replay()
    assert all(map(torch.equal, found, expected))
