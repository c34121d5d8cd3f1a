"""Tests the patterns that `bnres.fuse` and `bnres.explain` find, and the fused models' results."""

import copy
import pickle
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import bnres
from benchmarks.torchvision_import import torchvision
from bnres import models, use_backend
from bnres.fusion.backend import backend
from tests.device import DEVICE
from tests.steps import assert_same_steps
from tests.tolerances import formula_dtype


class Net(nn.Module):
    """Convolutions, batch norms and activations. ``body`` is the forward."""

    def __init__(self, body, dims=2):
        super().__init__()
        self.body = body
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.conv, self.conv2 = conv(4, 4, 3, padding=1), conv(4, 4, 1, groups=2)
        self.bn, self.bn2 = norm(4), norm(4)
        self.act, self.linear = nn.ReLU(inplace=True), nn.Linear(4, 4)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        return self.body(self, x)


def dilated(m, x):
    return F.relu(m.bn(F.conv2d(x, m.conv.weight, m.conv.bias, 1, 2, 2)))


def reflected(m, x):
    return F.relu(m.bn(m.conv(F.pad(x, (1, 1, 1, 1), mode="reflect"))))


def in_place_sum(m, x):
    y = m.bn(m.conv(x))
    y += x
    return F.relu_(y)


def counter_read(m, x):
    y = m.bn(m.conv(x))
    z = m.bn.num_batches_tracked * 2.0
    return F.relu(y) * z


# Each case has a forward, the number of spatial dimensions, and the pattern of each batch norm that
# the forward calls.
PATTERNS = {
    "conv-bn-act": (lambda m, x: m.act(m.bn(m.conv(x))), 2, ["conv-bn-act"]),
    "grouped": (lambda m, x: m.bn(m.conv2(x)).relu(), 2, ["conv-bn-act"]),
    "dilated": (dilated, 2, ["conv-bn-act"]),
    "reflected": (reflected, 2, ["conv-bn-act"]),
    "residual": (lambda m, x: torch.relu(m.bn(m.conv(x)) + x), 2, ["conv-bn-add-act"]),
    "residual first": (lambda m, x: torch.relu(x + m.bn(m.conv(x))), 2, ["conv-bn-add-act"]),
    "residual in place": (in_place_sum, 2, ["conv-bn-add-act"]),
    "add method": (lambda m, x: m.bn(x).add(x).sigmoid(), 2, ["bn-add-act"]),
    "no activation": (lambda m, x: torch.add(m.bn(x), x), 2, ["bn-add"]),
    "two norms": (
        lambda m, x: F.relu(m.bn(m.conv(x)) + m.bn2(m.conv2(x))),
        2,
        ["conv-bn+bn-add-act"] * 2,
    ),
    "two norms in place": (
        lambda m, x: m.bn(m.conv(x)).add_(m.bn2(x)).relu_(),
        2,
        ["conv-bn+bn-add-act"] * 2,
    ),
    "pool": (
        lambda m, x: F.max_pool2d(F.relu(m.bn(m.conv(x))), 3, 2, 1),
        2,
        ["conv-bn-act-pool"],
    ),
    "pool without activation": (
        lambda m, x: torch.max_pool2d(m.bn(x), 3, 2, 1),
        2,
        ["bn-pool"],
    ),
    "another pool": (lambda m, x: F.max_pool2d(F.relu(m.bn(x)), 2), 2, ["bn-act"]),
    "counter read": (counter_read, 2, ["conv-bn-act"]),
    "before the convolution": (lambda m, x: m.conv(F.relu(m.bn(x))), 2, ["bn-act"]),
    "vectors": (lambda m, x: F.relu(m.bn(m.linear(x))), 0, ["bn-act"]),
    "sequences": (lambda m, x: F.silu(m.bn(m.conv(x))), 1, ["bn-act"]),
    "volumes": (lambda m, x: F.relu(m.bn(m.conv(x)) + x), 3, ["bn-add-act"]),
    "relu6": (lambda m, x: F.relu6(m.bn(x)), 2, ["bn-act"]),
    "hardtanh": (lambda m, x: F.hardtanh(m.bn(x), 0.0, 6.0), 2, ["bn-act"]),
    "hardswish": (lambda m, x: F.hardswish(m.bn(m.conv(x)), inplace=True), 2, ["conv-bn-act"]),
    "silu": (lambda m, x: F.silu(m.bn(m.conv(x)), inplace=True), 2, ["conv-bn-act"]),
    "gelu": (lambda m, x: F.gelu(m.bn(x), approximate="tanh"), 2, ["bn-act"]),
    "leaky_relu": (lambda m, x: F.leaky_relu(m.bn(x), 0.3, True), 2, ["bn-act"]),
    "gate before the addition": (
        lambda m, x: F.relu(m.bn(m.conv(x)) * m.scale + x),
        2,
        ["conv-bn"],
    ),
}
SIZES = {0: (6, 4), 1: (3, 4, 5), 2: (3, 4, 5, 6), 3: (2, 4, 3, 4, 5)}


def stock_net(body, dims=2):
    torch.manual_seed(0)
    net = Net(body, max(dims, 1)).to(DEVICE).double()
    for norm in (net.bn, net.bn2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    return net


def batch(dims=2, seed=1):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(SIZES[dims], generator=generator, device=DEVICE, dtype=torch.float64)


def test_repr():
    """The repr shows that a model is fused.

    Copies and pickles of a fused model are unfused, and don't need bnres.
    """
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    stock, fused = repr(model), bnres.fuse(model)
    assert repr(fused) == stock.replace("(\n", "(\n  fused by bnres\n", 1)
    data = pickle.dumps(fused)
    assert b"bnres" not in data
    assert repr(copy.deepcopy(fused)) == repr(pickle.loads(data)) == stock
    again = bnres.fuse(copy.deepcopy(fused), inplace=True)
    assert repr(again) == repr(fused)
    assert repr(bnres.unfuse(again, inplace=True)) == stock
    assert repr(bnres.fuse(model[1])).startswith("BatchNorm2d(fused by bnres, 4, eps=1e-05")


@pytest.mark.parametrize(
    "backend", ["aten", pytest.param("triton-interpreter", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name, backend):
    body, dims, patterns = PATTERNS[name]
    stock, x = stock_net(body, dims), batch(dims)
    sites = bnres.explain(stock, x).sites
    assert [site.pattern for site in sites[: len(patterns)]] == patterns
    assert not any(site.fused for site in sites[len(patterns) :])
    fused = bnres.fuse(stock)
    with use_backend("triton" if DEVICE == "cuda" else backend):
        assert_same_steps(fused, stock, x, formula_dtype(name))


def test_two_readers_get_separate_tensors(monkeypatch):
    """If two layers read a block's output, the block's backward adds the two layers' gradients."""
    from bnres.operations import batch_norm_act

    given, run = [], batch_norm_act._run_backward

    def record(gradients, *args, **kwargs):
        given.append(gradients.dy_skip is not None)
        return run(gradients, *args, **kwargs)

    monkeypatch.setattr(batch_norm_act, "_run_backward", record)
    stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    block = torchvision.models.resnet.BasicBlock
    torch.manual_seed(0)
    stock = nn.Sequential(stem, block(4, 4), block(4, 4)).to(DEVICE).double()
    x = torch.randn(3, 3, 10, 10, dtype=torch.float64, device=DEVICE)
    fused = bnres.fuse(stock)
    with use_backend("triton" if DEVICE == "cuda" else "triton-interpreter"):
        assert_same_steps(fused, stock, x)
        given.clear()
        fused.float()(x.float()).sum().backward()  # the pooling kernels don't support fp64
    # Backward runs in this order: the last block's bn2 and bn1, the first block's bn2 and bn1, and
    # the stem. Only the first block's bn2 and the stem get a second gradient, because only their
    # outputs are read by two layers.
    assert given == [False, False, True, False, True]


class Fade(nn.Module):
    """A model whose forward reads buffers, a list, and whether the model is in training."""

    def __init__(self):
        super().__init__()
        self.bn, self.factors = nn.BatchNorm2d(4), [1.0]
        self.register_buffer("alpha", torch.tensor(0.25))
        self.register_buffer("on", torch.tensor(True))

    def forward(self, x):
        y = F.relu(self.bn(x)) * self.alpha.item()
        if not self.training:
            y = y + 1
        return (y * 2 if self.on else y) * sum(self.factors)


def test_state_that_a_forward_reads_may_change():
    stock = Fade().to(DEVICE).double()
    fused = bnres.fuse(stock)
    for change in (
        lambda m: None,
        lambda m: m.alpha.fill_(1.0),
        lambda m: m.load_state_dict(m.state_dict() | {"on": torch.tensor(False)}),
        lambda m: m.factors.append(3.0),
        lambda m: m.eval(),
        lambda m: setattr(m.bn, "eps", 0.5),
        lambda m: setattr(m.train().bn, "momentum", 0.7),
        lambda m: setattr(m.bn, "momentum", None),
        lambda m: setattr(m, "bn", nn.Identity()),
    ):
        for model in (stock, fused):
            change(model)
        torch.testing.assert_close(fused(batch()), stock(batch()), rtol=1e-9, atol=1e-9)
        for ours, theirs in zip(fused.buffers(), stock.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("norm", "shape", "words"),
    [
        (nn.BatchNorm1d, (3, 4, 2, 2), "2D or 3D input (got 4D"),
        (nn.BatchNorm2d, (3, 4), "4D input (got 2D"),
        (nn.BatchNorm2d, (4, 5, 5), "4D input (got 3D"),
        (nn.BatchNorm3d, (3, 4, 2, 2), "5D input (got 4D"),
    ],
)
def test_wrong_dimensions_are_refused(norm, shape, words, training):
    fused = bnres.fuse(nn.Sequential(norm(4), nn.ReLU())).train(training)
    with pytest.raises(ValueError, match=re.escape(words)):
        fused(torch.randn(shape))


def test_explain_names_norms_of_broken_graphs():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.bn2, self.unused = (nn.BatchNorm2d(4) for _ in range(3))

        def forward(self, x):
            x = F.relu(self.bn(x))
            print(end="")
            return self.bn2(x)

    model = nn.Sequential(Block(), Block(), nn.BatchNorm2d(4)).to(DEVICE)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = bnres.explain(model, batch().float())
    assert [(site.name, site.pattern) for site in report.sites] == [
        ("0.bn", "bn-act"), ("0.bn2", "bn"), ("0.unused", "-"),
        ("1.bn", "bn-act"), ("1.bn2", "bn"), ("1.unused", "-"), ("2", "-"),
    ]  # fmt: skip
    # After a graph break, Dynamo starts graphs in functions of the user, but not of torch.nn. So
    # the batch norms that the blocks call are fused, and "2", which nn.Sequential calls, is not.
    assert report.sites[6].reason == report.sites[2].reason
    assert report.sites[2].reason.startswith("torch.compile captured no call of it: ")
    assert str(report).splitlines()[-1] == "4 of 7 batch norms are fused"
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert torch.equal(torch.get_rng_state(), random)


def test_explain_without_inputs():
    with pytest.raises(TypeError, match=r"needs example inputs of the model: explain\(model, "):
        bnres.explain(nn.Sequential(nn.BatchNorm2d(4)))


def test_every_site_of_resnet18_is_fused():
    report = str(bnres.explain(models.resnet18(fused=False), torch.randn(2, 3, 32, 32)))
    assert report.splitlines()[-1] == "20 of 20 batch norms are fused"
    assert report.splitlines()[0].split() == ["bn1", "conv-bn-act-pool"]
    assert report.splitlines()[20:-1] == [
        "",
        "One operation computes everything in a pattern:",
        "conv  the convolution before the batch norm; in a pattern with +bn or pool, only its bias",
        "bn    batch norm",
        "+bn   batch norm of the residual",
        "add   addition",
        "act   activation",
        "pool  the max-pool of a ResNet's stem",
        "",
    ]


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return x.sin()


def test_the_legend_explains_the_patterns_that_occur():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Sequential()).to(DEVICE)
    assert str(bnres.explain(model, batch().float())).splitlines() == [
        "0  bn-act", "", "One operation computes everything in a pattern:", "bn    batch norm",
        "act   activation", "", "1 of 1 batch norms are fused",
    ]  # fmt: skip
    assert str(bnres.explain(Unused(), torch.ones(1))).splitlines() == [
        "norm  -  torch.compile captured no call of it", "",
        "-     not fused: the model's own batch norm runs", "", "0 of 1 batch norms are fused",
    ]  # fmt: skip
    assert str(bnres.explain(nn.ReLU(), batch().float())) == "0 of 0 batch norms are fused"


def test_wrong_arguments():
    for function in (bnres.fuse, bnres.unfuse, bnres.explain, bnres.fold):
        with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module, got str$"):
            function("resnet18")
    with pytest.raises(ValueError, match="options may only contain 'inner', got 'outer'"):
        backend(fx.symbolic_trace(nn.ReLU()), [], options={"outer": 1})
    with pytest.raises(
        ValueError, match=r"options\['inner'\] must be a backend or its name, got 3"
    ):
        backend(fx.symbolic_trace(nn.ReLU()), [], options={"inner": 3})


def test_the_backend_needs_no_import_of_bnres():
    code = """
import torch
from torch import nn
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
model.compile(backend="bnres")
model(torch.randn(2, 3, 5, 5))
import sys
assert "bnres" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_fused_models_do_not_share_the_limit_of_graphs(monkeypatch):
    """torch stores at most 8 graphs for each code object.

    All modules have the same code object for ``__call__``. So each fused model needs a new code
    object. Otherwise the ninth model would not be fused.
    """
    from bnres.fusion import rewrite

    calls, fuse_graph = [], rewrite.fuse_graph
    monkeypatch.setattr(rewrite, "fuse_graph", lambda m: calls.append(m) or fuse_graph(m))
    for channels in range(1, 12):
        bnres.fuse(nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()))(
            torch.randn(2, channels, 3, 3)
        )
    assert len(calls) == 11
