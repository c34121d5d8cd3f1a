"""Tests that fused and stock models compute the same, also with checkpoints, hooks and DDP."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import bnres
from benchmarks.torchvision_import import torchvision
from bnres import models, use_backend
from bnres.fusion.backend import backend
from bnres.fusion.explain import is_norm
from tests.device import DEVICE
from tests.recorded_sites import recorded_sites
from tests.tolerances import TOLERANCE

ROOT = Path(__file__).parent.parent
tv = torchvision.models
BasicBlock, Bottleneck = tv.resnet.BasicBlock, tv.resnet.Bottleneck
# The tolerance of whole models. It is larger than a layer's, because rounding errors grow from
# layer to layer, most of all in the gradients of small batches.
DEEP = 1e-9


def mobilenet(**options):
    return tv.MobileNetV2(inverted_residual_setting=[[1, 8, 1, 1], [6, 16, 2, 2]], **options)


def regnet(**options):
    stages = tv.regnet.BlockParams([1, 2], [16, 32], [8, 8], [1.0, 1.0], [2, 2], 0.25)
    return tv.RegNet(stages, stem_width=16, **options)


def mobilenet_v3(**options):
    row = partial(tv.mobilenetv3.InvertedResidualConfig, dilation=1, width_mult=1.0)
    rows = [row(8, 3, 16, 8, True, "RE", 2), row(8, 5, 24, 8, True, "HS", 1)]
    return tv.MobileNetV3(rows, last_channel=32, **options)


def d2l(name, **options):
    return models.create_model(name, in_channels=3, fused=False, **options)


def of_timm(name, **options):
    import timm  # imports torchvision, so torchvision_import must have been imported before

    return timm.create_model(name, **options)


# For each name, a function that builds the model, and the model's number of batch norms.
SMALL = {
    "resnet": (partial(tv.ResNet, BasicBlock, [1, 1, 1, 1]), 12),
    "bottleneck": (partial(tv.ResNet, Bottleneck, [1, 1, 1, 1], groups=2, width_per_group=8), 17),
    "mobilenet_v2": (mobilenet, 10),
    "mobilenet_v3": (mobilenet_v3, 8),
    "densenet": (partial(tv.DenseNet, 8, (2, 2), 16), 11),
    "shufflenet": (partial(tv.ShuffleNetV2, [1, 1, 1], [8, 16, 16, 16, 32]), 17),
    "regnet": (regnet, 12),
    "lenet-seed": (partial(d2l, "lenet-seed"), 4),
    "resnet18-seed": (partial(d2l, "resnet18-seed"), 17),
    "timm-resnet": (partial(of_timm, "test_resnet"), 15),
    "timm-efficientnet": (partial(of_timm, "test_efficientnet"), 13),
    "timm-byobnet": (partial(of_timm, "test_byobnet"), 14),
}
# Models that are not marked slow. Each of the other models takes at least ten seconds.
QUICK = ("lenet-seed", "timm-resnet", "timm-efficientnet")
# Each model's name, image size and number of batch norms.
WHOLE = [
    ("resnet18", 64, 20),
    ("resnet50", 64, 53),
    ("mobilenet_v3_small", 64, 34),
    ("googlenet", 64, 59),
    ("efficientnet_b0", 64, 49),
    ("vgg11_bn", 32, 8),
    ("r3d_18", 32, 20),
]


def assert_same(actual, expected, tolerance=DEEP):
    """Checks that the greatest difference is at most ``tolerance`` times a scale.

    The scale is the largest absolute expected value, or 1 if that value is below 1.
    """
    scale = max(1.0, expected.abs().max().item())
    assert (actual - expected).abs().max().item() <= tolerance * scale


def assert_same_state(fused, stock, tolerance=DEEP):
    """Checks that parameters and buffers agree within the tolerance.

    The tolerance of gradients is 100 times as large.
    """
    for p, q in zip(fused.parameters(), stock.parameters(), strict=True):
        assert_same(p, q, tolerance)
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            assert_same(p.grad, q.grad, 100 * tolerance)
    for b, c in zip(fused.buffers(), stock.buffers(), strict=True):
        if b.is_floating_point():
            assert_same(b, c, tolerance)
        else:
            assert torch.equal(b, c)


def logits(out):
    return out if isinstance(out, torch.Tensor) else out.logits


def step(model, x, rate=0.01):
    """Makes a step of SGD, with the same random numbers for all models. Returns the logits."""
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    optimizer.zero_grad()
    out = logits(model(x))
    F.cross_entropy(out, torch.arange(len(x), device=x.device) % out.shape[1]).backward()
    optimizer.step()
    return out.detach()


def assert_trains_alike(fused, stock, x, tolerance=DEEP):
    """Compares training, evaluation, training again, and a smaller last batch."""
    for batch in (x, None, x, x[:-1]):
        outputs = []
        for model in (fused, stock):
            model.train(batch is not None)
            if batch is None:
                with torch.no_grad():
                    outputs.append(logits(model(x)))
            else:
                outputs.append(step(model, batch))
        assert_same(*outputs, tolerance)
        assert_same_state(fused, stock, tolerance)


def assert_architecture(stock, x, norms):
    report = bnres.explain(stock, x)
    assert len(report.sites) == len(report.fused) == norms
    assert "bn" not in {site.pattern for site in report.sites}
    fused = bnres.fuse(stock)
    assert type(fused) is type(stock)
    assert list(fused.state_dict()) == list(stock.state_dict())
    assert_trains_alike(fused, stock, x)


@pytest.fixture(autouse=True)
def few_graphs():
    """Drops the graphs of other tests. On the CPU selects ATen, because the interpreter is slow."""
    torch._dynamo.reset()
    with use_backend("triton" if DEVICE == "cuda" else "aten"):
        yield


def small_architecture(name):
    """Returns the model with this name in `SMALL`, and a batch of images for it."""
    torch.manual_seed(0)
    model = SMALL[name][0](num_classes=5).to(DEVICE).double()
    return model, batch(size=28 if "seed" in name else 48)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SMALL]
)
def test_small_architectures(name):
    assert_architecture(*small_architecture(name), SMALL[name][1])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "norms"), WHOLE, ids=lambda v: str(v))
def test_whole_architectures(name, size, norms):
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    stock = tv.get_model(name, weights=None, num_classes=5, **options)
    if name == "vgg11_bn":
        stock.classifier = nn.Linear(512 * 7 * 7, 5)  # the original classifier is slow
    stock = stock.to(DEVICE).double()
    shape = (4, 3, 4, size, size) if name == "r3d_18" else (4, 3, size, size)
    assert_architecture(stock, torch.randn(shape, dtype=torch.float64, device=DEVICE), norms)


def small():
    """Returns a model of a stem with a max-pool, two residual blocks, and a classifier.

    The first block adds the outputs of two batch norms. The second adds its input to the output of
    a batch norm.
    """
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(4, 6, 1, stride=2, bias=False), nn.BatchNorm2d(6))
    model = nn.Sequential(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        ),
        nn.Sequential(BasicBlock(4, 6, 2, downsample=shortcut), BasicBlock(6, 6)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    )
    return model.to(DEVICE).double()


PATTERNS = [
    "conv-bn-act-pool", "conv-bn-act", "conv-bn+bn-add-act", "conv-bn+bn-add-act", "conv-bn-act",
    "conv-bn-add-act",
]  # fmt: skip


def batch(count=4, size=10):
    torch.manual_seed(1)
    return torch.randn(count, 3, size, size, dtype=torch.float64, device=DEVICE)


@pytest.fixture
def pair():
    stock = small()
    return bnres.fuse(stock), stock


def patterns(model, *inputs):
    return [site.pattern for site in bnres.explain(model, *inputs).sites]


def test_patterns_of_the_small_model():
    assert patterns(small(), batch()) == PATTERNS


def test_interpreted_kernels():
    stock = small()
    with use_backend("triton" if DEVICE == "cuda" else "triton-interpreter"):
        assert_trains_alike(bnres.fuse(stock), stock, batch(3, 6), 1e-7)


class Additions(nn.Module):
    """A model that adds the outputs of batch norms in place. Some tensors have views or aliases."""

    def __init__(self):
        super().__init__()
        self.bn = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(7))

    def forward(self, x):
        skip = self.bn[0](x)
        y = x * 2
        y += self.bn[1](x)
        y += self.bn[2](y + x)
        y += skip
        z = y + 1
        first = z[:1]
        z += self.bn[3](x)
        halves = torch.cat([x, y], dim=1).chunk(2, dim=1)
        a = halves[0]
        a += self.bn[4](x)
        kept = y + 2
        b = kept
        b += self.bn[5](x)
        x += self.bn[6](y)
        return torch.cat([y, z, a, halves[0], b, x]), first, kept


def test_additions_in_place():
    stock = Additions().to(DEVICE).double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, device=DEVICE)
    with torch.no_grad():  # with gradients, autograd refuses in-place writes to chunks
        assert patterns(stock, x.clone()) == ["bn-add"] * 3 + ["bn"] * 4
        fused = bnres.fuse(stock)
        inputs = x.clone(), x.clone()
        for actual, expected in zip(fused(inputs[0]), stock(inputs[1]), strict=True):
            assert_same(actual, expected)
    assert_same(*inputs)
    assert_same_state(fused, stock)


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


class Checkpointed(nn.Module):
    """The model of `small`, with checkpointed blocks."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks, self.head = small()

    def run_blocks(self, x):
        return checkpoint(self.blocks, x, use_reentrant=False)

    def forward(self, x):
        return self.head(self.run_blocks(self.stem(x)))


class CheckpointedInSegments(Checkpointed):
    def run_blocks(self, x):
        return checkpoint_sequential(self.blocks, 2, x, use_reentrant=False)


def test_gradient_checkpointing():
    stock = Checkpointed().to(DEVICE).double()
    assert patterns(stock, batch()) == PATTERNS
    assert_trains_alike(bnres.fuse(stock), stock, batch())


def test_gradient_checkpointing_in_segments():
    stock = CheckpointedInSegments().to(DEVICE).double()
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


def test_copies_and_pickles_are_stock(pair):
    fused, stock = pair
    step(fused, batch())
    step(stock, batch())
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), bnres.unfuse(fused)):
        assert twin._compiled_call_impl is None
        assert_same(twin(batch()), copy.deepcopy(stock)(batch()))
    assert bnres.unfuse(fused, inplace=True) is fused
    assert fused._compiled_call_impl is None
    assert_trains_alike(fused, stock, batch())


def test_a_pickle_needs_no_bnres(tmp_path):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    model = bnres.fuse(block.to(DEVICE).double())
    model(batch())
    model.eval()
    torch.save((model, batch(), model(batch()).detach()), tmp_path / "model.pt")
    code = f"""
import sys
sys.modules["bnres"] = None
import torch
model, x, out = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
torch.testing.assert_close(model(x), out)
assert not any(name.startswith("bnres.") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_state_dicts(pair):
    fused, stock = pair
    step(fused, batch())
    assert list(fused.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(fused.state_dict())
    assert_same(stock.eval()(batch()), fused.eval()(batch()))
    other = bnres.fuse(small())
    other(batch())
    other.load_state_dict(stock.state_dict())
    assert_same(other.eval()(batch()), stock(batch()))


def test_in_place_keeps_the_model_and_its_parameters():
    stock = small()
    model = copy.deepcopy(stock)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert bnres.fuse(model, inplace=True) is model
    for net, rule in ((model, optimizer), (stock, torch.optim.SGD(stock.parameters(), lr=0.1))):
        net(batch()).square().sum().backward()
        rule.step()
    assert_same_state(model, stock)


@pytest.mark.parametrize("strict", [True, False])
def test_export(pair, strict):
    fused, stock = (model.eval() for model in pair)
    fused(batch())
    program = torch.export.export(fused, (batch(),), strict=strict)
    assert not any("bnres" in str(node.target) for node in program.graph.nodes)
    assert_same(program.module()(batch()), stock(batch()))


def test_jit_trace(pair):
    fused, stock = (model.eval() for model in pair)
    fused(batch())
    traced = torch.jit.trace(fused, batch())
    assert "bnres" not in str(traced.inlined_graph)
    assert_same(traced(batch()), stock(batch()))


def test_fx_traces(pair):
    fused, stock = (nn.Sequential(model, nn.Tanh()).eval() for model in pair)
    fused(batch())
    for trace in (torch.fx.symbolic_trace, lambda model: make_fx(model)(batch())):
        traced = trace(fused)
        assert not any("bnres" in str(node.target) for node in traced.graph.nodes)
        assert_same(traced(batch()), stock(batch()))


def test_onnx(pair):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    fused = pair[0].eval()
    fused(batch())
    program = torch.onnx.export(fused, (batch(),), dynamo=True).model_proto
    onnx.checker.check_model(program)
    assert {node.domain for node in program.graph.node} == {""}


def test_functional_call(pair):
    given = [{n: 2 * p for n, p in model.named_parameters()} for model in pair]
    results = []
    for model, parameters in zip(pair, given, strict=True):
        out = torch.func.functional_call(model, parameters, (batch(),))
        results.append((out, *torch.autograd.grad(out.square().sum(), list(parameters.values()))))
    for actual, expected in zip(*results, strict=True):
        assert_same(actual, expected)
    assert_same_state(*pair)


def test_second_derivatives(pair):
    results = []
    for model in pair:
        x, parameters = batch().requires_grad_(), list(model.parameters())
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        results.append((dx, *torch.autograd.grad(dx.square().sum(), parameters)))
    for actual, expected in zip(*results, strict=True):
        assert_same(actual, expected)


def test_data_parallel(pair):
    wrapped = nn.DataParallel(pair[0])
    assert_same(step(wrapped, batch()), step(pair[1], batch()))
    assert_same_state(*pair)


def test_the_memory_of_an_output_is_freed(pair):
    output = weakref.ref(pair[0](batch()))
    gc.collect()
    assert output() is None


@pytest.mark.parametrize(
    "inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_the_backend_and_its_inner_compiler(inner):
    stock = small()
    model = torch.compile(copy.deepcopy(stock), backend=backend, options={"inner": inner})
    for _ in range(2):
        assert_same(step(model, batch()), step(stock, batch()))
        assert_same_state(model, stock)


def test_a_fused_model_inside_a_compiled_function(pair):
    fused, stock = pair
    compiled = torch.compile(lambda x: fused(x) * 2, backend="aot_eager", fullgraph=True)
    assert_same(compiled(batch()), stock(batch()) * 2)


@pytest.fixture
def inductor_cache(tmp_path, monkeypatch):
    from torch._functorch import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with config.patch(enable_autograd_cache=True), torch._inductor.utils.fresh_cache():
        yield


@pytest.mark.slow
def test_inductor(inductor_cache):
    from torch._dynamo.utils import counters

    stock = small()
    with bnres.inductor():
        model = torch.compile(copy.deepcopy(stock))
        assert_trains_alike(model, stock, batch())
        torch._dynamo.reset()
        counters.clear()
        step(model, batch())
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    assert counters["aot_autograd"]["autograd_cache_miss"] == 0


@pytest.mark.slow
def test_inductor_with_a_user_pass(inductor_cache):
    from torch._inductor import config

    seen = []

    def norms(graph):
        return len(graph.find_nodes(op="call_function", target=F.batch_norm))

    def users_pass(graph):
        seen.append((graph, norms(graph)))

    stock = small()
    with config.patch(pre_grad_custom_pass=users_pass), bnres.inductor():
        assert_same(torch.compile(copy.deepcopy(stock))(batch()), stock(batch()))
    ((graph, before),) = seen
    assert (before, norms(graph)) == (6, 0)


def test_inductor_cache_key():
    from bnres.fusion.inductor import FusePass

    first = FusePass(None)
    key = first.uuid()
    assert FusePass(None).uuid() == key
    with use_backend("triton-interpreter" if DEVICE == "cpu" else "aten"):
        assert first.uuid() != key
    with bnres.use_conv_route("kernel"):
        assert first.uuid() != key
    with bnres.recompute():
        assert first.uuid() != key
    with patch("bnres.fusion.inductor.get_hash_for_files") as hashed:
        first.uuid()
    (sources,) = hashed.call_args.args
    ends = ("bnres/fusion/match.py", "bnres/kernels/bn_forward.py")
    assert all(any(source.endswith(end) for source in sources) for end in ends)
    assert FusePass([first]).uuid() != key
    assert FusePass(lambda graph: None).uuid() is None
