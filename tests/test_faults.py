"""Tests errors of disks and files: the command prints one line, fails, and loses no file."""

import errno
import os
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.environment import IDENTITY
from benchmarks.store import ResultStore, load
from bnres import files
from bnres.cli import app
from bnres.errors import report
from bnres.train import TrainConfig, build_state, train_epoch
from bnres.train import run as training
from bnres.train.checkpoint import FORMAT, checkpoint_bytes, read_checkpoint, save_checkpoint
from bnres.train.config import read_config
from tests.command import run
from tests.disks import read_only, small_disk

MEGABYTE = 1 << 20
# A checkpoint of this small net has a size of about 0.4 MB.
TRAIN = ["train", "--model", "lenet-seed", "--batch-size", "8", "--shift", "0"]
pytestmark = pytest.mark.usefixtures("aten")


@pytest.fixture
def checkpoint(tiny, tmp_path):
    config = TrainConfig(model="lenet-seed", epochs=3, batch_size=8)
    path = tmp_path / "run" / "last.pt"
    path.parent.mkdir()
    state, _ = build_state(config, tiny)
    save_checkpoint(path, state, config)
    return path


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "disk" / "file"
    with small_disk(path.parent, MEGABYTE):
        files.write_text(path, "first")
        with pytest.raises(OSError, match="file") as raised:
            files.write_bytes(path, bytes(2 * MEGABYTE))
        assert raised.value.errno in (errno.ENOSPC, errno.EFBIG)
        assert [p.name for p in path.parent.iterdir()] == ["file"] and path.read_text() == "first"
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    files.write_text(link, "through")
    assert link.is_symlink() and target.read_text() == "through"


def test_writing_keeps_permissions_other_files_and_pipes(tmp_path):
    private, other = tmp_path / "private", tmp_path / "private.tmp"
    for path in (private, other):
        path.write_text("theirs")
    private.chmod(0o600)
    files.write_text(private, "new")
    assert private.read_text() == "new" and private.stat().st_mode & 0o777 == 0o600
    assert other.read_text() == "theirs"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write_text(pipe, "through")
    assert os.read(reader, 100) == b"through" and pipe.is_fifo()
    os.close(reader)
    with pytest.raises(OSError, match="/dev/full") as raised:
        files.write_text(Path("/dev/full"), "nothing")
    assert raised.value.errno == errno.ENOSPC and Path("/dev/full").is_char_device()


def test_training_checks_the_free_space_before_it_starts(tiny, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, MEGABYTE // 4):
        stderr = run(*TRAIN, "--epochs", 1, "--out", disk / "run", code=1)
        assert "the checkpoints need 1." in stderr and "there is no checkpoint yet" in stderr
        assert [p.name for p in (disk / "run").iterdir()] == ["config.toml"]
    # A run accepts the folder of another run that ended before its first checkpoint.
    out = tmp_path / "run"
    out.mkdir()
    (out / "tensorboard").mkdir()
    for name in ("config.toml", "nonfinite.json", f".last.pt{files.TEMPORARY}"):
        (out / name).write_text("")
    run(*TRAIN, "--epochs", 1, "--out", out)
    assert read_checkpoint(out / "last.pt")["epoch"] == 1


def test_failed_save_keeps_the_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    """The disk fills up in the second epoch."""
    disk, write = tmp_path / "disk", training.write_curves
    out = disk / "run"

    def write_and_fill(*arguments):
        write(*arguments)
        if (out / "last.pt").exists():
            with (disk / "others").open("wb") as file:
                file.write(bytes(8 * MEGABYTE))

    monkeypatch.setattr(training, "write_curves", write_and_fill)
    with small_disk(disk, 4 * MEGABYTE):
        stderr = run(*TRAIN, "--epochs", 3, "--out", out, code=1)
        assert stderr.endswith(
            f"the last good checkpoint is kept; continue with: bnres train --resume {out}/last.pt\n"
        )
        assert not list(out.glob("*.tmp*"))
        assert read_checkpoint(out / "last.pt")["epoch"] == 1
        (disk / "others").unlink()
        monkeypatch.setattr(training, "write_curves", write)
        run("train", "--resume", out / "last.pt")
        assert read_checkpoint(out / "last.pt")["epoch"] == 3


def test_resuming_on_a_full_disk_keeps_the_checkpoint(checkpoint, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, MEGABYTE):
        kept = disk / "last.pt"
        kept.write_bytes(checkpoint.read_bytes())
        stderr = run("train", "--resume", kept, code=1)
        assert "the last good checkpoint is kept" in stderr
        assert kept.read_bytes() == checkpoint.read_bytes()
        # This run writes to a folder that does not contain the checkpoint.
        stderr = run("train", "--resume", checkpoint, "--out", disk / "run", code=1)
        assert stderr.endswith(f"continue with: bnres train --resume {checkpoint}\n")


@pytest.mark.parametrize("folded", ["--folded", "--no-folded"])
def test_export_on_a_full_disk(checkpoint, tmp_path, folded):
    disk = tmp_path / "disk"
    with small_disk(disk, MEGABYTE // 64):
        run("export", checkpoint, folded, "--out", disk / "net.pt2", code=1)
        assert list(disk.iterdir()) == []


def test_augment_on_a_full_disk(tmp_path):
    Image.new("RGB", (64, 48), (200, 90, 30)).save(tmp_path / "picture.png")
    run("augment", tmp_path / "picture.png", "--out", tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert (200, 90, 30) in {color for _, color in grid.convert("RGB").getcolors(1 << 20)}
    disk = tmp_path / "disk"
    with small_disk(disk, MEGABYTE // 128):
        run("augment", tmp_path / "picture.png", "--out", disk / "grid.png", code=1)
        assert list(disk.iterdir()) == []


def test_results_on_a_full_disk(tmp_path):
    """An incomplete last line of the results is dropped. The complete lines are kept."""
    disk, record = tmp_path / "disk", {"id": "0", "text": "x" * 1000}
    with small_disk(disk, MEGABYTE // 32):
        results = ResultStore(disk / "results", dict.fromkeys(IDENTITY, "this"))
        with pytest.raises(OSError, match=r"No space left on device|File too large"):
            for i in range(100):
                results.add(record | {"id": str(i)})
        whole = [*results.records.values()]
        assert load(disk / "results")[1] == whole and len(whole) > 10
        again = ResultStore(disk / "results", dict.fromkeys(IDENTITY, "this"))
        assert [*again.records.values()] == whole
        assert len((disk / "results" / "results.jsonl").read_text().splitlines()) == len(whole)


def test_read_only_folders(checkpoint, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / "last.pt").write_bytes(checkpoint.read_bytes())
    with read_only(locked):
        for arguments in (
            [*TRAIN, "--epochs", 1, "--out", locked / "run"],
            ["train", "--resume", locked / "last.pt"],
            ["export", checkpoint, "--out", locked / "net.pt2"],
            ["augment", tmp_path / "picture.png", "--out", locked / "grid.png"],
        ):
            stderr = run(*arguments, code=1)
            assert "Read-only file system" in stderr or "Permission denied" in stderr
            assert str(locked) in stderr
        with pytest.raises(OSError, match="locked"):
            ResultStore(locked / "results", dict.fromkeys(IDENTITY, "this"))
    assert [p.name for p in locked.iterdir()] == ["last.pt"]


def test_a_dead_worker_ends_the_run_in_one_line(tmp_path, monkeypatch):
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            picture = Image.new("RGB", (32, 32), (60 * i, 0, 0))
            picture.save(tmp_path / "images" / name / f"{i}.png")
    monkeypatch.setattr("bnres.data.folder.read_rgb", lambda *_: os.kill(os.getpid(), 9))
    stderr = run(
        *TRAIN[:1], "--dataset", "folder", "--data", tmp_path / "images", "--batch-size", 4,
        "--crop-size", 16, "--stem", "cifar", "--workers", 1, "--out", tmp_path / "run", code=1,
    )  # fmt: skip
    assert "DataLoader worker" in stderr and stderr.endswith("(--traceback shows where)\n")


def test_traceback_on_request(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        app(["eval", str(tmp_path / "missing.pt"), "--traceback"])


@pytest.mark.parametrize("command", [["eval"], ["export"], ["train", "--resume"]], ids=" ".join)
def test_missing_and_damaged_checkpoints(command, checkpoint, tmp_path):
    missing = tmp_path / "missing.pt"
    assert run(*command, missing, code=2).endswith(f"there is no file {str(missing)!r}\n")
    told = run(*command, tmp_path, code=2)
    assert told.endswith(f"is a folder; give a file, such as {str(tmp_path / 'best.pt')!r}\n")
    data = bytearray(checkpoint.read_bytes())
    data[len(data) // 2] ^= 1  # a byte of the weights, which torch.load does not check
    checkpoint.write_bytes(data)
    wanted = f"bnres: {checkpoint} is damaged, or not a checkpoint of bnres\n"
    assert run(*command, checkpoint, code=2) == wanted
    torch.save({"format": FORMAT}, checkpoint)
    assert run(*command, checkpoint, code=2) == wanted


def test_checkpoint_of_a_model_that_has_changed(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    content["model"]["more"] = torch.zeros(1)
    torch.save(content, checkpoint)
    reason = "does not fit model 'lenet-seed': Unexpected key(s) in state_dict: \"more\".\n"
    for command in (["eval"], ["export"]):
        assert run(*command, checkpoint, code=2) == f"bnres: {checkpoint} {reason}"
    assert run("train", "--resume", checkpoint, code=2) == f"bnres: resume: {checkpoint} {reason}"


def test_out_of_memory_is_not_reported_as_damage(checkpoint, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(torch, "load", fail)
    assert "out of memory" in run("eval", checkpoint, code=1)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else a == b


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Returns the data truncated, or with one byte changed."""
    if draw.random() < 0.3:
        return data[: draw.randrange(len(data))]
    place = draw.randrange(len(data))
    return data[:place] + bytes([data[place] ^ draw.randrange(1, 256)]) + data[place + 1 :]


def test_damaged_files_load_correctly_or_give_one_line(checkpoint, tmp_path):
    draw, path = random.Random(0), tmp_path / "damaged"
    whole, expected = checkpoint.read_bytes(), read_checkpoint(checkpoint)
    config = TrainConfig(lr=0.5, data=Path("images"), dataset="folder").as_toml().encode()
    for _ in range(100):
        path.write_bytes(damaged(whole, draw))
        try:
            assert same(read_checkpoint(path), expected)
        except ValueError as error:
            assert str(error) == f"{path} is damaged, or not a checkpoint of bnres"
        path.write_bytes(damaged(config, draw))
        try:
            TrainConfig(**read_config(path))
        except ValueError as error:
            assert str(error).count("\n") == 0 and str(error)


@pytest.mark.slow
def test_checkpoint_bytes_is_the_size_of_a_checkpoint(tiny, tmp_path):
    for options in ({}, {"optimizer": "adamw"}, {"ema": 0.9}, {"optimizer": "adam", "ema": 0.9}):
        config = TrainConfig(model="resnet18", stem="cifar", batch_size=8, epochs=1, **options)
        run = training.prepare(config)
        train_epoch(run.state, run.batches, config)
        path = tmp_path / "checkpoint.pt"
        save_checkpoint(path, run.state, config)
        assert path.stat().st_size == pytest.approx(checkpoint_bytes(run.state), rel=0.01)


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b"),
         "a/b: No space left on device", 1),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"),
         "out of memory: CUDA out of memory. Tried; use a smaller batch or image size", 1),
        (ModuleNotFoundError("No module named 'timm'", name="timm"),
         "timm is missing; install it with: pip install timm", 1),
        (MemoryError(), "out of memory: MemoryError; use a smaller batch or image size", 1),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate"),
         "out of memory: [enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate; "
         "use a smaller batch or image size", 1),
        (KeyError("x"), "KeyError: 'x' (--traceback shows where)", 1),
        (RuntimeError("Error(s) in loading:\n\tMissing key\nmore"),
         "Error(s) in loading: Missing key (--traceback shows where)", 1),
        (RuntimeError("worker 3 exited\nmore"), "worker 3 exited (--traceback shows where)", 1),
        (ValueError("lr must be greater than 0"), "lr must be greater than 0", 2),
        (AssertionError(), "AssertionError (--traceback shows where)", 1),
    ],
    ids=repr,
)  # fmt: skip
def test_line_and_exit_code_of_an_error(error, line, code, monkeypatch):
    assert report(error) == (f"bnres: {line}", code)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert report(error) == (f"bnres, process 1: {line}", code)
