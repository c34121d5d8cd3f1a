"""Tests of models that a user names as PACKAGE.MODULE:FACTORY."""

import json
import sys

import pytest
import torch

from benchmarks.torchvision_import import torchvision
from bnres import cli
from bnres.data.dataset import make_dataset
from bnres.fusion import rewrite
from bnres.models import create_model
from bnres.train import TrainConfig, build_state, evaluate, train_epoch
from bnres.train.checkpoint import read_checkpoint
from bnres.train.options import make_config
from tests import own_models
from tests.command import run

pytestmark = pytest.mark.usefixtures("aten")
OWN = "tests.own_models"


def dataset(channels=1, size=8):
    """Returns images of two classes: either the left half or the right half is bright."""
    torch.manual_seed(0)
    labels = torch.arange(48) % 2
    images = torch.randint(0, 60, (48, channels, size, size), dtype=torch.uint8)
    for i, label in enumerate(labels):
        images[i, :, :, size // 2 * label : size // 2 * (label + 1)] += 150
    train, test = (images[:32], labels[:32]), (images[32:], labels[32:])
    return make_dataset("tiny", ("left", "right"), train, test)


@pytest.fixture
def tiny(monkeypatch):
    found = dataset()
    for place in ("bnres.train.run", "bnres.train.trained"):
        monkeypatch.setattr(f"{place}.load_dataset", lambda *where, **options: found)
    return found


@pytest.fixture
def graphs(monkeypatch):
    """Returns a list to which each graph that bnres.fuse rewrites is appended."""
    calls, original = [], rewrite.fuse_graph
    monkeypatch.setattr(rewrite, "fuse_graph", lambda m: calls.append(m) or original(m))
    return calls


def config(model, **options):
    return TrainConfig(**{"epochs": 2, "batch_size": 8, "shift": 0, "model": model, **options})


@pytest.mark.parametrize("name", ["Net", "gray", "by_chans"])
def test_factories_get_what_their_signatures_name(name):
    model = create_model(f"{OWN}:{name}", num_classes=7, in_channels=1)
    assert isinstance(model, own_models.Net)
    assert (model.stem[0].in_channels, model.head.out_features) == (1, 7)


def test_models_of_torchvision_and_timm():
    model = create_model("torchvision:resnet18", num_classes=7, in_channels=3)
    assert type(model) is torchvision.models.ResNet and model.fc.out_features == 7
    model = create_model("timm:resnet18d", num_classes=7, in_channels=1)
    assert model.conv1[0].in_channels == 1 and model.fc.out_features == 7


@pytest.mark.parametrize("fused", [True, False])
def test_training_equals_the_stock_models(graphs, fused):
    """Fusing keeps the keys of the state dict, and changes the losses only by rounding."""
    found = []
    for each in (fused, False):
        asked = config(f"{OWN}:Net", fused=each, device="cpu")
        state, batches = build_state(asked, dataset())
        found.append(train_epoch(state, batches, asked).step_losses)
        assert bool(graphs) == fused
        stock = own_models.Net(2, 1).state_dict()
        assert list(state.model.state_dict()) == list(stock)
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_compiled_models_are_fused(graphs, monkeypatch):
    """With ``compile=True`` the model is fused. aot_eager replaces Inductor, which needs C++."""
    asked = config(f"{OWN}:Net", compile=True, device="cpu")
    original = torch.compile

    def compile(model, *, options=None, **others):
        if options == {"inner": "inductor"}:
            options = {"inner": "aot_eager"}
        return original(model, options=options, **others)

    monkeypatch.setattr(torch, "compile", compile)
    state, batches = build_state(asked, dataset())
    train_epoch(state, batches, asked)
    assert graphs


def test_commands(tiny, tmp_path, monkeypatch, graphs):
    """A model whose factory is in the current folder is trained, evaluated and exported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/elsewhere", *sys.path])
    (tmp_path / "my_net.py").write_text(
        "from tests.own_models import Net\nclass Nets:\n    small = Net\n"
    )
    run("train", "--model", "my_net:Nets.small", "--batch-size", 8, "--epochs", 2, "--shift", 0,
        "--out", "run")  # fmt: skip
    assert graphs
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    content = read_checkpoint(tmp_path / "run" / "last.pt")
    assert content["config"]["model"] == "my_net:Nets.small"
    stock = own_models.Net(2, 1).eval()
    stock.load_state_dict(content["model"])
    output = run("eval", "run/last.pt")
    assert output == (
        f"my_net:Nets.small on mnist5k: loss {row['test_loss']:.4f}, "
        f"accuracy {row['test_accuracy']:.2%}\n"
    )
    run("export", "run/last.pt", "--out", "net.pt2")
    images = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    mean, std = (torch.tensor(content[name]).view(-1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        y = torch.export.load("net.pt2").module()(images)
        assert torch.allclose(y, stock((images / 255 - mean) / std), atol=1e-5)


def test_folder_of_a_run():
    folder = cli.run_folder(None, config(f"{OWN}:Net"))
    assert folder.name.startswith(f"mnist5k-{OWN}-Net-")


def test_lazy_modules_are_initialized():
    asked = config(f"{OWN}:lazy", device="cpu")
    state, batches = build_state(asked, dataset())
    assert state.model[2].weight.shape == (2, 4 * 6 * 6)
    train_epoch(state, batches, asked)


def test_checking_a_model_changes_no_tensor():
    torch.manual_seed(0)
    expected = own_models.Net(2, 1)
    state, _ = build_state(config(f"{OWN}:Net", device="cpu"), dataset())
    for name, value in expected.state_dict().items():
        assert torch.equal(state.model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["missing_package:net"],
         "model: module 'missing_package' is neither installed nor in the current folder"),
        (["tests.missing:net"],
         "model: module 'tests.missing' is neither installed nor in the current folder"),
        ([f"{OWN}:missing"], f"model: module '{OWN}' has no 'missing'"),
        ([f"{OWN}:NUMBER"], f"model must name a callable, but '{OWN}:NUMBER' is of type int"),
        ([f"{OWN}:MODULE"], "model must name a function that returns a new module, but "
         f"'{OWN}:MODULE' is a module of type Linear"),
        ([f"{OWN}:text"], "model must name a factory that returns a torch.nn.Module, but "
         f"'{OWN}:text' returned str"),
        ([f"{OWN}:compiled"], f"model must name a factory that returns an uncompiled module, but "
         f"'{OWN}:compiled' returned OptimizedModule; to compile the model, use --compile"),
        ([f"{OWN}:traced"], f"model must name a factory that returns an uncompiled module, but "
         f"'{OWN}:traced' returned TopLevelTracedModule; to compile the model, use --compile"),
        ([f"{OWN}:deep"], f"model '{OWN}:deep': missing a required argument: 'depth'"),
        (["builtins:dict"],
         "model 'builtins:dict': no signature found for builtin type <class 'dict'>"),
        ([f"{OWN}:"], f"model must be PACKAGE.MODULE:FACTORY, got '{OWN}:'"),
        ([":net"], "model must be PACKAGE.MODULE:FACTORY, got ':net'"),
        (["torchvision:resnet19"],
         "model: torchvision has no image classification model 'resnet19'"),
        (["timm:resnet19"], "model: timm has no model 'resnet19'"),
        ([f"{OWN}:Net", "--act", "silu"],
         f"act works only with models of bnres, got model '{OWN}:Net'"),
        ([f"{OWN}:Net", "--stem", "cifar"],
         f"stem works only with models of bnres, got model '{OWN}:Net'"),
        ([f"{OWN}:five"], f"model '{OWN}:five' must return 2x2, a number for each of 2 classes, "
         "for an input of 2x1x8x8, but in evaluation it returned 2x5"),
        ([f"{OWN}:TwoHeads"], f"model '{OWN}:TwoHeads' must return 2x2, a number for each of 2 "
         "classes, for an input of 2x1x8x8, but in training it returned tuple"),
        ([f"{OWN}:TwoInputs"], f"model '{OWN}:TwoInputs' does not accept inputs of 2x1x8x8: "
         "TwoInputs.forward() missing 1 required positional argument: 'y'"),
        ([f"{OWN}:NoImages"], f"model '{OWN}:NoImages' does not accept inputs of 2x1x8x8: "
         "Dimension out of range (expected to be in range of [-4, 3], but got 4)"),
        ([f"{OWN}:frozen"], f"model '{OWN}:frozen' has no parameter that requires a gradient"),
        (["torchvision:resnet18"], "model 'torchvision:resnet18' does not accept inputs of "
         "2x1x8x8: Given groups=1, weight of size [64, 3, 7, 7], expected input[2, 1, 8, 8] to "
         "have 3 channels, but got 1 channels instead"),
        (["lenet-seed"], "model 'lenet-seed' does not accept inputs of 2x1x8x8: Calculated padded "
         "input size per channel: (2 x 2). Kernel size: (5 x 5). Kernel size can't be greater than "
         "actual input size"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)  # fmt: skip
def test_models_that_do_not_fit_are_one_line(arguments, line, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run("train", "--batch-size", 8, "--model", *arguments, code=2)
    assert found == f"bnres: {line}\n"
    assert list(tmp_path.iterdir()) == []


def test_images_of_another_size():
    with pytest.raises(
        ValueError, match=r"not accept inputs of 2x1x64x64: mat1 .*\(2x2704 and 256x120\)"
    ):
        build_state(config("lenet-seed", device="cpu"), dataset(size=64))


def test_a_package_that_the_users_module_imports_is_missing(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imports_missing.py").write_text("import missing_package\n")
    found = run("train", "--batch-size", 8, "--model", "imports_missing:net", code=1)
    assert found == (
        "bnres: missing_package is missing; install it with: pip install missing_package\n"
    )


def test_random_numbers_of_an_import_do_not_change_the_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/elsewhere", *sys.path])
    (tmp_path / "draws.py").write_text(
        "import torch\nfrom tests.own_models import Net\ntorch.rand(3)\n"
    )
    found = [build_state(config("draws:Net", device="cpu"), dataset())[0] for _ in range(2)]
    first, second = (state.model.state_dict() for state in found)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_factorys_model_drops_the_presets_stem():
    asked = make_config({"model": f"{OWN}:Net"}, "cifar10-fast", None)
    assert (asked.stem, asked.model, asked.lr) == (None, f"{OWN}:Net", 0.4)
    assert make_config({"model": "resnet50"}, "cifar10-fast", None).stem == "cifar"


def test_averaged_models_are_fused(graphs):
    asked = config(f"{OWN}:Net", ema=0.5, device="cpu")
    state, batches = build_state(asked, dataset())
    loss = evaluate(state.evaluated, batches, asked)[0]
    assert graphs
    stock, batches = build_state(config(f"{OWN}:Net", fused=False, device="cpu"), dataset())
    assert loss == pytest.approx(evaluate(stock.model, batches, asked)[0], abs=1e-5)
