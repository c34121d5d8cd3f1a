"""Tests that fused and stock models train alike, also with AMP, DDP, checkpoints and hooks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import bnres
from bnres.fusion.backend import backend
from bnres.fusion.explain import is_norm
from tests.device import DEVICE
from tests.recorded_sites import recorded_sites
from tests.small_models import (
    PATTERNS,
    SMALL,
    assert_same,
    assert_same_state,
    assert_trains_alike,
    batch,
    logits,
    patterns,
    small,
    small_architecture,
    step,
)
from tests.tolerances import TOLERANCE

pytestmark = pytest.mark.usefixtures("few_graphs")


def test_frozen_norms(pair):
    for model in pair:
        block = model[1][0]
        block.bn1.eval()
        block.downsample[1].eval().requires_grad_(False)
        model[1][1].bn2.requires_grad_(False)
    for _ in range(2):
        assert_same(*(step(model, batch()) for model in pair))
        assert_same_state(*pair)
    assert pair[0][1][0].bn1.num_batches_tracked == 0
    assert patterns(pair[1], batch())[1:4] == ["conv-bn-act", "conv-bn-add-act", "conv-bn"]


def test_momentum_and_eps_that_change(pair):
    for momentum, eps in ((0.1, 1e-5), (0.7, 0.5), (None, 0.5), (0.2, 1e-3)):
        for model in pair:
            model[0][1].momentum = momentum
            model[1][0].bn2.eps = eps
        assert_same(*(step(model, batch()) for model in pair))
        assert_same_state(*pair)


def test_autocast():
    stock = small().float()
    fused, x = bnres.fuse(stock), batch().float()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        outputs = [step(model, x) for model in (fused, stock)]
        assert patterns(stock, x) == PATTERNS
    assert outputs[0].dtype == outputs[1].dtype
    assert_same(*outputs, TOLERANCE[torch.bfloat16])
    assert_same_state(fused, stock, TOLERANCE[torch.bfloat16])


def test_accumulated_gradients(pair):
    for model in pair:
        for part in batch(6).split(2):
            (model(part).square().sum() / 3).backward()
    assert_same_state(*pair)


def test_averaged_models_and_update_bn(pair):
    averages = [torch.optim.swa_utils.AveragedModel(model) for model in pair]
    for model, average in zip(pair, averages, strict=True):
        for _ in range(2):
            step(model, batch())
            average.update_parameters(model)
        torch.optim.swa_utils.update_bn([batch(), batch() * 2, batch() - 1], average)
    assert_same_state(*averages)
    assert averages[0].module[0][1].num_batches_tracked == 3
    assert_same(*(average.eval()(batch()) for average in averages))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_training_techniques(name):
    """Fused and stock models agree when gradients are accumulated and weights are averaged.

    They also agree in ``update_bn`` and in autocast.
    """
    stock, x = small_architecture(name)
    fused, batches = bnres.fuse(stock), [x, x * 2]
    averages, errors = [], []
    for model in (fused, stock):
        torch.manual_seed(3)
        for x in batches:
            (logits(model(x)).square().mean() / 2).backward()
        averages.append(torch.optim.swa_utils.AveragedModel(model))
        step(model, batches[0])
        averages[-1].update_parameters(model)
        torch.optim.swa_utils.update_bn(batches, averages[-1])
    assert_same_state(fused, stock)
    assert_same_state(*averages)
    exact = step(copy.deepcopy(stock), batches[0])
    with torch.autocast(DEVICE, dtype=torch.bfloat16), recorded_sites() as sites:
        for model in (fused, stock):
            out = step(model.float(), batches[0].float())
            assert out.dtype == torch.bfloat16
            errors.append((out - exact).abs().max().item() / max(1, exact.abs().max().item()))
    assert len(sites) == SMALL[name][1] and all(site.fused for site in sites)
    assert errors[0] <= 2 * errors[1] + TOLERANCE[torch.bfloat16]


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "nccl" if DEVICE == "cuda" else "gloo",
        init_method=f"file://{tmp_path}/store",
        rank=0,
        world_size=1,
    )
    yield
    torch.distributed.destroy_process_group()


def record_graphs(model):
    """Returns the compiled model, and a list that gets the targets of each fused graph."""
    graphs = []

    def record(module, example_inputs):
        call = backend(module, example_inputs)
        graphs.append([node.target for node in module.graph.nodes])
        return call

    return torch.compile(model, backend=record), graphs


@pytest.fixture
def buckets(process_group, monkeypatch):
    """Options of DistributedDataParallel with which a model's gradients are in several buckets.

    Dynamo's DDPOptimizer then splits the graph.
    """
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1024)
    return {"bucket_cap_mb": 0.001}


def test_distributed_data_parallel(pair, buckets):
    fused, stock = pair
    wrapped = nn.parallel.DistributedDataParallel(fused, **buckets)
    for _ in range(2):
        assert_same(step(wrapped, batch()), step(stock, batch()))
        assert_same_state(fused, stock)


@pytest.mark.parametrize("name", [None, *(pytest.param(n, marks=pytest.mark.slow) for n in SMALL)])
def test_graphs_divided_into_buckets(name, buckets):
    stock, x = (small(), batch()) if name is None else small_architecture(name)
    fused, graphs = record_graphs(copy.deepcopy(stock))
    wrapped = nn.parallel.DistributedDataParallel(fused, **buckets)
    for part in (x, x[:-1]):
        assert_same(step(wrapped, part), step(stock, part))
        assert_same_state(fused, stock)
    assert len(graphs) > 2  # several for each of the two batch sizes
    assert not any(F.batch_norm in graph for graph in graphs)


class CheckpointedStage(nn.Module):
    """Calls a module with gradient checkpointing."""

    def __init__(self, stage):
        super().__init__()
        self.stage = stage

    def forward(self, x):
        return checkpoint(self.stage, x, use_reentrant=False)


def checkpoint_stages(model):
    """Checkpoints each child of a model that contains batch norms."""
    for name, child in model.named_children():
        if any(map(is_norm, child.modules())):
            setattr(model, name, CheckpointedStage(child))


def double_norms(model):
    """Adds a hook to each batch norm that doubles the batch norm's output."""
    for module in filter(is_norm, model.modules()):
        module.register_forward_hook(lambda m, i, out: out * 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("change", [checkpoint_stages, double_norms])
def test_checkpoints_and_hooks_in_architectures(name, change):
    stock, x = small_architecture(name)
    change(stock)
    fused = bnres.fuse(stock)
    with recorded_sites() as sites:
        for part in (x, x[:-1]):
            assert_same(step(fused, part), step(stock, part))
            assert_same_state(fused, stock)
    assert len(sites) >= SMALL[name][1] and all(site.fused for site in sites)


def test_gradient_checkpointing():
    stock = small()
    stock[1] = CheckpointedStage(stock[1])
    assert patterns(stock, batch()) == PATTERNS
    assert_trains_alike(bnres.fuse(stock), stock, batch())


class CheckpointedInSegments(nn.Module):
    """The model of `small`, whose blocks are checkpointed in two segments."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks, self.head = small()

    def forward(self, x):
        return self.head(checkpoint_sequential(self.blocks, 2, self.stem(x), use_reentrant=False))


def test_gradient_checkpointing_in_segments():
    stock = CheckpointedInSegments()
    sites = bnres.explain(stock, batch()).sites
    # Dynamo captures only the last of the two segments.
    assert [site.fused for site in sites] == [True] + [False] * 3 + [True] * 2
    assert all("`checkpoint_sequential`" in site.reason for site in sites[1:4])
    assert_trains_alike(bnres.fuse(stock), stock, batch())


def add_hooks(model):
    """Adds hooks of each kind, and returns the list to which some of the hooks append."""
    seen, block = [], model[1][0]
    block.bn1.register_forward_hook(lambda m, i, out: seen.append("norm"))
    block.register_forward_hook(lambda m, i, out: out * 2)
    block.register_forward_pre_hook(lambda m, i: (i[0] + 1,))
    model[0][1].weight.register_hook(lambda grad: grad * 3)
    model[0][1].weight.register_post_accumulate_grad_hook(
        lambda p: seen.append(p.grad.sum().item())
    )
    model.register_full_backward_hook(lambda m, i, o: seen.append("backward"))
    return seen


def test_hooks(pair):
    seen = [add_hooks(model) for model in pair]
    for _ in range(2):
        assert_same(*(step(model, batch()) for model in pair))
        assert_same_state(*pair)
    assert seen[0] == pytest.approx(seen[1])
    assert seen[0].count("norm") == seen[0].count("backward") == 2


def test_data_parallel(pair):
    wrapped = nn.DataParallel(pair[0])
    assert_same(step(wrapped, batch()), step(pair[1], batch()))
    assert_same_state(*pair)
