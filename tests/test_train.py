"""Training: data, loop, checkpoints, the command line and its errors."""

import csv
import os

import pytest
import torch
from typer.testing import CliRunner

from bnres import cli, use_backend
from bnres.data.dataset import make_dataset
from bnres.train import TrainConfig, build_state, train_epoch
from bnres.train import run as training
from bnres.train.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint

runner = CliRunner()


@pytest.fixture(autouse=True)
def aten():
    """What is tested here is the trainer: the kernels have their own tests."""
    with use_backend("triton" if torch.cuda.is_available() else "aten"):
        yield


@pytest.fixture(scope="module")
def tiny():
    """Two classes, bright left and bright right, 8×8."""
    torch.manual_seed(0)
    labels = torch.arange(48) % 2
    images = torch.randint(0, 60, (48, 1, 8, 8), dtype=torch.uint8)
    for i, label in enumerate(labels):
        images[i, 0, :, 4 * label : 4 * label + 4] += 150
    train, test = (images[:32], labels[:32]), (images[32:], labels[32:])
    return make_dataset("tiny", ("left", "right"), train, test)


@pytest.fixture
def tiny_command(tiny, monkeypatch):
    monkeypatch.setattr(training, "load_dataset", lambda *place, **options: tiny)


def config(**options):
    return TrainConfig(**{"epochs": 3, "batch_size": 8, "lr": 0.02, **options})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "stock"])
def test_it_learns(tiny, tiny_command, dtype, fused, tmp_path):
    from rich.console import Console

    run = training.prepare(config(dtype=dtype, fused=fused, epochs=8))
    training.fit(run, tmp_path / "run", Console(quiet=True))
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == list("12345678")
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert float(rows[-1]["test_accuracy"]) == 1.0
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_resumed_run_is_the_uninterrupted_one(tiny, tmp_path):
    path = tmp_path / "checkpoint.pt"
    whole, batches = build_state(config(), tiny)
    for _ in range(3):
        train_epoch(whole, batches, config())
    first, batches = build_state(config(), tiny)
    train_epoch(first, batches, config())
    save_checkpoint(path, first, config())
    second, batches = build_state(config(), tiny)
    load_checkpoint(path, second, config())
    assert second.epoch == 1
    for _ in range(2):
        train_epoch(second, batches, config())
    for p, q in zip(
        second.model.state_dict().values(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(p, q)


def test_failed_write_leaves_the_old_checkpoint(tiny, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    state, _ = build_state(config(), tiny)
    save_checkpoint(path, state, config())
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, state, config(seed=1))
    assert path.read_bytes() == before
    assert read_checkpoint(path)["config"]["seed"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--dataset", "imagenet"],
            "dataset must be one of mnist5k, digits, synthetic-cifar",
        ),
        (["--model", "vgg"], "model must be one of resnet18"),
        (["--act", "mish"], "act must be one of"),
        (["--dtype", "int8"], "dtype must be one of fp32, bf16, fp16, got 'int8'"),
        (["--device", "gpu"], "device 'gpu' can't be used"),
        (["--batch-size", "1"], "batch_size must be at least 2, got 1"),
        (["--compare", "--stock"], "no stock with it"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--batch-size", "64"], "batch_size must be from 2 to 32"),
        (["--out", "missing/run"], "there is no folder 'missing'"),
        (["--out", "."], "'.' exists already"),
        (["--resume", "missing.pt"], "there is no file 'missing.pt'"),
        (["--resume", "text.pt", "--batch-size", "8"], "text.pt is not a checkpoint"),
        (["--resume", "other.pt", "--batch-size", "8"], "checkpoint of model 'resnet34'"),
        (
            ["--model", "lenet-seed", "--act", "silu", "--batch-size", "8"],
            "model 'lenet-seed': got an unexpected",
        ),
        (
            ["--resume", "other.pt", "--batch-size", "8", "--model", "resnet34", "--seed", "1"],
            "seed=0",
        ),
        (["--compare", "--resume", "other.pt", "--batch-size", "8"], "can't go with resume"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments, words, tiny, tiny_command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pt").write_text("no checkpoint")
    other = config(model="resnet34", epochs=5, lr=0.03)
    save_checkpoint(tmp_path / "other.pt", build_state(other, tiny)[0], other)
    before = sorted(p.name for p in tmp_path.iterdir())
    result = runner.invoke(cli.app, ["train", *arguments])
    assert result.exit_code == 2
    assert words in result.stderr and result.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_train_command_writes_its_folder(tiny_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(cli.app, ["train", "--epochs", "1", "--batch-size", "8", "--out", "run"])
    assert result.exit_code == 0, result.output
    assert "fused layers" in result.output and "images/s" in result.output
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "checkpoint.pt",
        "metrics.csv",
        "curves.png",
    }


def test_compare_command(tiny_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    result = runner.invoke(cli.app, ["train", "--compare", "--epochs", "2", "--batch-size", "8"])
    assert result.exit_code == 0, result.output
    for words in ("fused layers", "stock layers", "drift", "images/s"):
        assert words in result.output
    assert not list(tmp_path.iterdir())


def test_summary_command():
    result = runner.invoke(cli.app, ["summary", "resnet18-seed", "--input", "1x1x224x224"])
    assert "Sequential" in result.output and "1x128x28x28" in result.output
    assert runner.invoke(cli.app, ["summary", "lenet-seed"]).exit_code == 0
    for arguments in (
        ["vgg"],
        ["resnet18", "--input", "3x224"],
        ["lenet-seed", "--input", "1x1x9x9"],
    ):
        result = runner.invoke(cli.app, ["summary", *arguments])
        assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
