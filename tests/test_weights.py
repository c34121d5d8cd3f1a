"""Tests initial weights from files, and the files that bnres export writes."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bnres.models import create_model
from bnres.train import TrainConfig, build_state, train_epoch
from bnres.train.augmentation import chains
from bnres.train.checkpoint import read_checkpoint, save_checkpoint
from bnres.train.export import export_checkpoint
from bnres.train.trained import config_of, load_trained
from bnres.train.weights import as_safetensors, load_weights
from tests.command import run

NET = "lenet-seed"
pytestmark = pytest.mark.usefixtures("aten")


def config(**options):
    return TrainConfig(**{"model": NET, "epochs": 3, "batch_size": 8, "shift": 0, **options})


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """Returns the path of a checkpoint after one epoch of a run that averages its weights."""
    asked = config(ema=0.5)
    state, batches = build_state(asked, tiny)
    train_epoch(state, batches, asked)
    path = tmp_path / "last.pt"
    save_checkpoint(path, state, asked)
    return path


def test_training_starts_from_exported_weights(checkpoint, tiny):
    out = checkpoint.with_suffix(".safetensors")
    assert run("export", checkpoint, "--format", "safetensors") == f"{out}\n"
    content, weights = read_checkpoint(checkpoint), load_file(out)
    stock = create_model(NET, num_classes=2, fused=False).state_dict()
    assert weights.keys() == stock.keys()
    for key, value in weights.items():
        assert torch.equal(value, content["average"][f"module.{key}"]), key
    assert not torch.equal(weights["0.weight"], content["model"]["0.weight"])
    state, _ = build_state(config(init=str(out), ema=0.9), tiny)
    for key, value in weights.items():
        assert torch.equal(state.model.state_dict()[key].cpu(), value), key
        assert torch.equal(state.average.module.state_dict()[key].cpu(), value), key


def test_a_run_is_resumed_without_its_file_of_initial_weights(
    checkpoint, tiny, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    first = tmp_path / "first.safetensors"
    first.write_bytes(as_safetensors(create_model(NET, num_classes=2)))
    asked = config(init=str(first), epochs=1)
    state, _ = build_state(asked, tiny)
    save_checkpoint(tmp_path / "last.pt", state, asked)
    first.unlink()
    run("train", "--resume", "last.pt")
    run("eval", "last.pt")
    run("export", "last.pt")


def test_tied_and_channels_last_weights_are_stored():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.a = self.b = nn.Linear(2, 2)

    from safetensors.torch import load

    model = Tied().to(memory_format=torch.channels_last)
    found = load(as_safetensors(model))
    for key, value in model.state_dict().items():
        assert torch.equal(found[key], value), key


def weights(**changes):
    found = create_model(NET, num_classes=2).state_dict()
    return {k: v for k, v in {**found, **changes}.items() if v is not None}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"15.weight": torch.zeros(10, 84)}, "size mismatch for 15.weight: copying a param with"),
        ({"1.weight": None}, 'Missing key(s) in state_dict: "1.weight".'),
        ({"more": torch.zeros(1)}, 'Unexpected key(s) in state_dict: "more".'),
    ],
    ids=["classifier", "missing", "extra"],
)
def test_weights_that_do_not_fit_are_one_line(changes, reason, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(weights(**changes), "w.safetensors")
    found = run("train", "--model", NET, "--batch-size", 8, "--init", "w.safetensors", code=2)
    line = f"bnres: init: w.safetensors does not fit model '{NET}': {reason}"
    assert found.startswith(line) and found.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_state_that_is_not_a_tensor_is_refused():
    class Counts(nn.Module):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            pass

    with pytest.raises(ValueError, match="has a dict in '_extra_state', but safetensors holds"):
        as_safetensors(Counts())


def test_files_without_weights_are_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.safetensors").write_text("no weights")
    model = create_model(NET, num_classes=2)
    with pytest.raises(ValueError, match=r"^init: .*text.safetensors can't be read: .*header"):
        load_weights(tmp_path / "text.safetensors", model, NET)
    for init, line in (
        ("missing.safetensors", "init: there is no file 'missing.safetensors'"),
        ("he.pt", "init must be one of he, xavier or FILE.safetensors, got 'he.pt'"),
    ):
        found = run("train", "--model", NET, "--batch-size", 8, "--init", init, code=2)
        assert found == f"bnres: {line}\n"


def test_export_refuses(checkpoint, monkeypatch):
    for arguments, line in (
        (["--format", "tflite"], "format must be one of pt2, onnx, safetensors, got 'tflite'"),
        (["--format", "safetensors", "--size", "32"],
         "size: safetensors holds only weights, which do not depend on the size"),
        (["--out", "."], "out must be a file, got the folder '.'"),
        (["--size", "40"], "size: the model does not accept inputs of 2x1x40x40: mat1 and mat2 "
         "shapes cannot be multiplied (2x784 and 256x120)"),
    ):  # fmt: skip
        assert run("export", checkpoint, *arguments, code=2) == f"bnres: {line}\n"
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    found = run("export", checkpoint, "--format", "onnx", code=1)
    assert found == "bnres: onnxscript is missing; install it with: pip install onnxscript\n"
    assert [p.name for p in checkpoint.parent.iterdir()] == [checkpoint.name]


@pytest.mark.parametrize("folded", [True, False], ids=["folded", "not folded"])
@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_onnx_model_equals_torchs(checkpoint, tiny, folded, batch):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime runs the exported model")
    pytest.importorskip("onnxscript", reason="torch's exporter to ONNX needs onnxscript")
    out = checkpoint.with_suffix(".onnx")
    if folded:
        assert run("export", checkpoint, "--format", "onnx") == f"{out}\n"
    else:
        export_checkpoint(checkpoint, out, folded=False, format="onnx")
    content = read_checkpoint(checkpoint)
    asked = config_of(content, device="cpu")
    model = load_trained(checkpoint, content, asked)
    images = torch.randint(256, (batch, 1, 28, 28), dtype=torch.uint8)
    session = onnxruntime.InferenceSession(out.read_bytes(), providers=["CPUExecutionProvider"])
    (given,), (returned,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("images", ["batch", 1, 28, 28])
    assert (returned.name, returned.shape) == ("logits", ["batch", 2])
    assert given.type == "tensor(uint8)"
    (y,) = session.run(None, {"images": images.numpy()})
    _, scale = chains(asked, tiny)
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(y), model(scale(images)), atol=1e-5)
