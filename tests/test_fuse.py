"""fuse: the stock model's outputs, gradients and running statistics, whatever is done to it."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnres
from benchmarks.torchvision_import import torchvision
from bnres import models, use_backend
from bnres.fusion.forward import FusedForward
from tests.device import DEVICE

# Name, input size, batch norms, those that take in what follows them.
ARCHITECTURES = [
    ("resnet18", 64, 20, 20),
    ("resnet50", 64, 53, 53),
    ("wide_resnet50_2", 32, 53, 53),
    ("resnext50_32x4d", 32, 53, 53),
    ("densenet121", 64, 121, 120),
    ("mobilenet_v2", 64, 52, 52),
    ("googlenet", 64, 59, 59),
    ("regnet_y_400mf", 64, 53, 53),
    ("shufflenet_v2_x0_5", 64, 56, 56),
    ("vgg11_bn", 32, 8, 8),
]


def build(name):
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(weights=None, num_classes=5, **options)
    if name == "vgg11_bn":
        model.classifier = nn.Linear(512 * 7 * 7, 5)  # its own is all of the time
    return model.to(DEVICE)


def logits(out):
    return out if isinstance(out, torch.Tensor) else out.logits


def assert_alike(actual, expected, tolerance):
    scale = max(1.0, expected.abs().max().item())
    assert (actual - expected).abs().max().item() <= tolerance * scale


def compare(stock, fused, x, tolerance=1e-9):
    """One training step and one evaluation of both, from the same random numbers."""
    for training in (True, False):
        outputs = []
        for model in (stock, fused):
            model.zero_grad()
            model.train(training)
            torch.manual_seed(3)
            out = logits(model(x))
            F.cross_entropy(out, torch.arange(len(x), device=x.device) % 5).backward()
            outputs.append(out)
        assert_alike(outputs[1], outputs[0], tolerance)
        for (name, p), q in zip(stock.named_parameters(), fused.parameters(), strict=True):
            if p.grad is not None:
                assert_alike(q.grad, p.grad, tolerance * 100), name
        for b, c in zip(stock.buffers(), fused.buffers(), strict=True):
            assert_alike(c.double(), b.double(), tolerance)


@pytest.mark.parametrize(("name", "size", "norms", "grown"), ARCHITECTURES, ids=lambda v: str(v))
def test_architectures(name, size, norms, grown):
    stock = build(name).double()
    report = bnres.explain(stock)
    assert len(report.sites) == len(report.fused) == norms
    assert sum(site.pattern != "bn" for site in report.sites) == grown
    fused = bnres.fuse(stock)
    assert type(fused) is type(stock)
    assert list(fused.state_dict()) == list(stock.state_dict())
    x = torch.randn(4, 3, size, size, dtype=torch.float64, device=DEVICE)
    with use_backend("triton" if DEVICE == "cuda" else "aten"):
        compare(stock, fused, x)
    assert not any("forward" in vars(m) for m in bnres.unfuse(fused).modules())


@pytest.mark.parametrize("name", ["resnet18", "resnet18-seed", "lenet-seed"])
def test_our_stock_models(name):
    torch.manual_seed(0)
    channels = 3 if name == "resnet18" else 1
    stock = models.create_model(name, num_classes=5, in_channels=channels, fused=False).to(DEVICE)
    stock = stock.double().to(memory_format=torch.channels_last)
    x = torch.randn(3, channels, 28, 28, dtype=torch.float64, device=DEVICE)
    # The interpreter takes a minute for a ResNet-18.
    backend = "triton-interpreter" if name == "lenet-seed" else "aten"
    with use_backend("triton" if DEVICE == "cuda" else backend):
        compare(stock, bnres.fuse(stock), x.to(memory_format=torch.channels_last), 1e-6)


def test_every_site_of_resnet18_is_fused():
    report = str(bnres.explain(models.resnet18(fused=False)))
    assert report.splitlines()[-1] == "20 fused sites of 20"
    assert report.splitlines()[0].split() == ["bn1", "conv-bn-act-pool"]


def test_fused_block_with_a_stock_norm():
    torch.manual_seed(0)
    stock = nn.Sequential(models.blocks.BasicBlock(4, 6, 2), models.blocks.BasicBlock(6, 6))
    stock[0].bn1, stock[0].act1 = nn.BatchNorm2d(6), nn.ReLU()
    stock[0].bn2.momentum = None  # its counter is raised by whoever asks for its momentum
    stock = stock.to(DEVICE).double()
    fused = bnres.fuse(stock)
    assert bnres.explain(stock).sites[0].pattern == "conv-bn-act"
    assert stock[0].bn2.num_batches_tracked == 0
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(fused(x), stock(x))
    assert fused[0].bn2.num_batches_tracked == stock[0].bn2.num_batches_tracked == 1


class Spellings(nn.Module):
    """The patterns as functions, methods and in place."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(7))
        self.leaky = nn.LeakyReLU(0.2)

    def forward(self, x):
        x = torch.relu_(self.bn[0](self.conv(x)))
        y = self.bn[1](x)
        y += x
        y = F.leaky_relu(y, 0.3)
        y = F.gelu(self.bn[2](y), approximate="tanh")
        y = self.leaky(torch.add(x, self.bn[3](y)))
        z = self.bn[4](y).add_(self.bn[5](x)).relu_()
        return F.max_pool2d(F.relu(self.bn[6](z), inplace=True), 2, stride=1, padding=1)


def test_spellings():
    stock = Spellings().to(DEVICE).double()
    report = bnres.explain(stock)
    assert [site.pattern for site in report.sites] == [
        "conv-bn-act", "bn-add-act", "bn-act", "bn-add-act", "bn+bn-add-act", "bn+bn-add-act",
        "bn-act-pool",
    ]  # fmt: skip
    fused = bnres.fuse(stock)
    head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 36, 5)).to(DEVICE).double()
    x = torch.randn(3, 3, 5, 5, dtype=torch.float64, device=DEVICE)
    compare(nn.Sequential(stock, head), nn.Sequential(fused, copy.deepcopy(head)), x, 1e-6)


class Traps(nn.Module):
    """Values that are used elsewhere, and tensors written in place on the way."""

    def __init__(self):
        super().__init__()
        self.bn = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))

    def forward(self, x):
        a = self.bn[0](x)
        b = F.relu(a) + a  # used twice
        c = self.bn[1](b)
        b.mul_(2)  # written before the addition reads it
        d = F.relu(c + b)
        e = d * 1
        e += self.bn[2](d)  # writes into another's tensor
        return F.relu(self.bn[3](e)) + e


def test_what_is_in_doubt_is_left():
    stock = Traps().to(DEVICE).double()
    report = bnres.explain(stock)
    assert [site.pattern for site in report.sites] == ["bn", "bn", "bn", "bn-act"]
    assert "used elsewhere" in report.sites[0].reason
    assert "written in place" in report.sites[1].reason
    assert "others may hold" in report.sites[2].reason
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(bnres.fuse(stock)(x), stock(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls, self.feats, self._flag = 0, {}, True
        self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU()
        self.register_buffer("seen", torch.zeros(()))

    def end(self, x):
        return self.relu(self.bn(x))


class DependsOnData(Block):
    def forward(self, x):
        return x if x.sum() > 1e9 else self.end(x)


class Counts(Block):
    def forward(self, x):
        self.calls += 1
        return self.end(x)


class CountsInABuffer(Block):
    def forward(self, x):
        self.seen += 1
        return self.end(x)


class Stores(Block):
    def forward(self, x):
        self.feats["x"] = x
        return self.end(x)


class DrawsNumbers(Block):
    def forward(self, x):
        return self.end(x) if torch.rand(1).item() < 2 else x


class OpensAContext(Block):
    def forward(self, x):
        with torch.no_grad():
            return self.end(x)


class Decorated(Block):
    @torch.no_grad()
    def forward(self, x):
        return self.end(x)


class AsksForGradients(Block):
    def forward(self, x):
        return self.end(x) if torch.is_grad_enabled() else self.end(x) + 1


class AsksAChildsMode(Block):
    def forward(self, x):
        return self.end(x) if self.bn.training else self.bn(x)


class AsksForATensor(Block):
    def forward(self, x):
        return self.end(x) if torch.is_tensor(x) else x


UNPROVED = {
    DependsOnData: "can't be traced",
    Counts: "changes its attribute 'calls'",
    CountsInABuffer: "changes its attribute",
    Stores: "changes its attribute 'feats'",
    DrawsNumbers: "draws random numbers",
    OpensAContext: "has a with or a try",
    Decorated: "opens a context",
    AsksForGradients: "depends on its children's mode, or on recorded gradients",
    AsksAChildsMode: "depends on its children's mode, or on recorded gradients",
    AsksForATensor: "asks is_tensor",
}


@pytest.mark.parametrize("cls", UNPROVED, ids=lambda c: c.__name__)
def test_forwards_that_are_not_proved(cls):
    block = cls().to(DEVICE)
    model = nn.Sequential(block, nn.BatchNorm2d(3), nn.ReLU()).to(DEVICE)
    state, dice = copy.deepcopy(vars(block)), torch.get_rng_state()
    report = bnres.explain(model)
    assert report.sites[0].pattern == "bn" and UNPROVED[cls] in report.sites[0].reason
    assert report.sites[1].pattern == "bn-act"
    assert (block.calls, block.feats, block.seen.item()) == (0, {}, 0)
    assert set(vars(block)) == set(state) and torch.equal(dice, torch.get_rng_state())
    fused = bnres.fuse(model)
    assert isinstance(fused[0].bn, bnres.nn.BatchNorm2d) and "forward" not in vars(fused[0])
    x = torch.randn(2, 3, 3, 3, device=DEVICE)
    for training in (True, False):
        torch.testing.assert_close(fused.train(training)(x), model.train(training)(x))
    assert type(bnres.unfuse(fused)[0].bn) is nn.BatchNorm2d


class Options(Block):
    """Inputs and attributes that decide."""

    def forward(self, x, skip=None, scale=1.0):
        y = self.bn(x)
        if skip is None:
            skip = x
        y = self.relu(y + skip) * scale
        return y if self._flag else -y


def test_what_the_garbage_collector_calls_does_not_count():
    def callback(phase, info):
        try:
            pass
        finally:
            pass

    stock = nn.Sequential(*(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()) for _ in range(3)))
    threshold = gc.get_threshold()
    gc.callbacks.append(callback)
    gc.set_threshold(1)
    try:
        report = bnres.explain(stock)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(callback)
    assert [site.pattern for site in report.sites] == ["bn-act"] * 3


def test_what_decides_is_guarded():
    stock = Options().to(DEVICE).double()
    fused = bnres.fuse(stock)
    x, skip, small = (torch.randn(2, 3, n, n, device=DEVICE).double() for n in (3, 3, 1))
    for arguments in ((x,), (x, skip), (x, skip, 2.0), (x, skip, skip), (x, small, skip)):
        torch.testing.assert_close(fused(*arguments), stock(*arguments))
    torch.testing.assert_close(fused(x, scale=skip, skip=skip), stock(x, scale=skip, skip=skip))
    for model in (stock, fused):
        model._flag = False
    torch.testing.assert_close(fused(x, skip, skip), stock(x, skip, skip))


def test_children_that_are_replaced_later():
    stock = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    stock = stock.to(DEVICE).double()
    fused = bnres.fuse(stock)
    x = torch.randn(2, 3, 4, 4, device=DEVICE).double()
    for change in (
        lambda m: m.__setitem__(2, nn.ELU()),
        lambda m: m.__setitem__(3, nn.Identity()),
        lambda m: setattr(m[0], "forward", lambda x, f=m[0].forward: f(x) * 2),
    ):
        for model in (stock, fused):
            change(model)
        torch.testing.assert_close(fused(x), stock(x))


def test_broadcast_additions_and_writes_inside_children():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.bn2 = nn.BatchNorm2d(3)
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.down = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1))

        def forward(self, x):
            x = x * 1
            y = F.relu(self.bn(self.conv(x)) + self.pool(x))
            z = self.bn2(self.conv(x))
            return F.relu(z + self.down(x)) + y

    stock = Net().to(DEVICE).double().eval()
    x = torch.randn(2, 3, 3, 3, device=DEVICE).double()
    torch.testing.assert_close(bnres.fuse(stock)(x), stock(x))
    assert "written in place" in bnres.explain(stock).sites[1].reason


class Modes(nn.Module):
    """A forward that goes other ways in training, and by an attribute."""

    def __init__(self):
        super().__init__()
        self.bn, self.scale = nn.BatchNorm2d(3), 1.0

    def forward(self, x):
        y = F.relu(self.bn(x))
        if self.training:
            y = F.dropout(y, 0.5, self.training)
        return y * 2 if self.scale > 1 else y


def test_control_flow_is_the_models_own():
    stock = Modes().to(DEVICE)
    fused = bnres.fuse(stock)
    x = torch.randn(4, 3, 3, 3, device=DEVICE)
    for training in (True, False):
        for scale in (1.0, 2.0):
            for model in (stock, fused):
                model.train(training).scale = scale
            torch.manual_seed(1)
            expected = stock(x)
            torch.manual_seed(1)
            torch.testing.assert_close(fused(x), expected)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    block = torchvision.models.resnet.BasicBlock
    shortcut = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
    stock = nn.Sequential(block(3, 4, downsample=shortcut), block(4, 4)).to(DEVICE).double()
    return stock, bnres.fuse(stock), torch.randn(3, 3, 4, 4, device=DEVICE).double()


def assert_same(pair):
    stock, fused, x = pair
    torch.testing.assert_close(fused(x), stock(x), rtol=1e-6, atol=1e-6)
    for b, c in zip(stock.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(c, b, rtol=1e-6, atol=1e-6)


def test_a_batch_norms_own_state_counts_at_the_call(pair):
    stock, fused, _ = pair
    for change in (
        lambda m: m[0].bn2.eval(),
        lambda m: setattr(m[0].bn1, "momentum", 0.7),
        lambda m: setattr(m[1].bn1, "momentum", None),
        lambda m: setattr(m[1].bn2, "eps", 0.5),
        lambda m: m[0].downsample[1].requires_grad_(False),
        lambda m: m.eval(),
    ):
        for model in (stock, fused):
            change(model)
        assert_same(pair)


def test_update_bn(pair):
    stock, fused, x = pair
    for model in (stock, fused):
        torch.optim.swa_utils.update_bn([x, x * 2, x - 1], model)
    assert stock[0].bn1.num_batches_tracked == 3
    assert_same(pair)


def test_parameters_copies_and_pickles(pair):
    stock, fused, x = pair
    model = copy.deepcopy(stock)
    parameters = list(model.parameters())
    assert bnres.fuse(model, inplace=True) is model
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    before = copy.deepcopy(stock)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert twin[0].forward.module is twin[0]
        assert_same((copy.deepcopy(before), twin, x))
        assert isinstance(twin[0].forward, FusedForward) and twin[0].forward.variants
        with torch.no_grad():
            twin[0].conv1.weight.zero_()
        assert not torch.allclose(twin(x), stock(x)) and stock[0].conv1.weight.abs().max() > 0


def test_hooks_are_called(pair):
    stock, fused, _ = pair
    seen = []
    fused[0].relu.register_forward_hook(lambda *_: seen.append("relu"))
    fused[0].bn1.register_forward_hook(lambda *_: seen.append("bn1"))
    fused[1].register_forward_hook(lambda *_: seen.append("block"))
    assert_same(pair)
    assert seen.count("bn1") == 1 and seen.count("relu") == 2 and seen.count("block") == 1
    stock[0].bn1.register_forward_hook(lambda *_: None)
    site = bnres.explain(stock).sites[0]
    assert not site.fused and site.reason == "a hook waits on 0.bn1"


def test_gradients_of_a_block_meet_in_its_reduce_pass(pair, monkeypatch):
    """The first block's output goes two ways; its backward takes both gradients, unsummed."""
    stock, fused, x = pair
    from bnres.operations import batch_norm_act as operation

    taken, original = [], operation._run_backward

    def record(gradients, saved, spec, asked, recording):
        if spec.has_residual_norm:
            taken.append(gradients.dy_skip)
        return original(gradients, saved, spec, asked, recording=recording)

    monkeypatch.setattr(operation, "_run_backward", record)
    fused(x).sum().backward()
    assert len(taken) == 1 and taken[0] is not None

    def watch(output, grads):
        output.register_hook(grads.append)

    # An output that someone watches has one gradient, whole.
    grads = []
    for model in (stock, fused):
        model[0].register_forward_hook(lambda m, i, out: watch(out, grads))
        model(x).square().sum().backward()
    assert_alike(grads[1], grads[0], 1e-6)
    assert len(taken) == 2 and taken[1] is None


def test_an_output_is_freed_whoever_takes_it(pair):
    _, fused, x = pair
    outputs = []
    inner = torch.randn(3, 4, 4, 4, dtype=x.dtype, device=DEVICE)
    for model, given in ((fused, x), (fused[0], x), (fused[1], inner)):
        outputs.append(weakref.ref(model(given)))
    gc.collect()
    assert [output() for output in outputs] == [None] * 3


def test_compiled_whole(pair):
    _, fused, x = pair
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    expected = copy.deepcopy(fused)(x)
    torch.testing.assert_close(compiled(x), expected)


def test_distributed_data_parallel(pair, tmp_path):
    stock, fused, x = pair
    torch.distributed.init_process_group(
        "nccl" if DEVICE == "cuda" else "gloo",
        init_method=f"file://{tmp_path}/store",
        rank=0,
        world_size=1,
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(fused)
        wrapped(x).square().sum().backward()
        stock(x).square().sum().backward()
        for p, q in zip(stock.parameters(), fused.parameters(), strict=True):
            assert_alike(q.grad, p.grad, 1e-6)
    finally:
        torch.distributed.destroy_process_group()
