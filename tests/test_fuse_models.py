"""Tests that fused models compute, copy and export like stock models."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import bnres
from benchmarks.torchvision_import import torchvision
from bnres import use_backend
from bnres.fusion.backend import backend
from tests.device import DEVICE
from tests.small_models import (
    PATTERNS,
    SMALL,
    assert_same,
    assert_same_state,
    assert_trains_alike,
    batch,
    patterns,
    small,
    small_architecture,
    step,
)

pytestmark = pytest.mark.usefixtures("few_graphs")

ROOT = Path(__file__).parent.parent
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


def assert_architecture(stock, x, norms):
    report = bnres.explain(stock, x)
    assert len(report.sites) == len(report.fused) == norms
    assert "bn" not in {site.pattern for site in report.sites}
    fused = bnres.fuse(stock)
    assert type(fused) is type(stock)
    assert list(fused.state_dict()) == list(stock.state_dict())
    assert_trains_alike(fused, stock, x)


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
    stock = torchvision.models.get_model(name, weights=None, num_classes=5, **options)
    if name == "vgg11_bn":
        stock.classifier = nn.Linear(512 * 7 * 7, 5)  # the original classifier is slow
    stock = stock.to(DEVICE).double()
    shape = (4, 3, 4, size, size) if name == "r3d_18" else (4, 3, size, size)
    assert_architecture(stock, torch.randn(shape, dtype=torch.float64, device=DEVICE), norms)


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
import torch.nn.functional as F
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
