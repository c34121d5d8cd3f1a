"""Trains epoch by epoch, prints progress, and writes the files of the run's folder."""

import errno
import importlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bnres.backend import backend
from bnres.data import EpochBatches, load_dataset
from bnres.errors import describe
from bnres.files import write_text
from bnres.train.checkpoint import checkpoint_bytes, load_checkpoint, save_checkpoint
from bnres.train.config import TrainConfig
from bnres.train.distributed import World
from bnres.train.interrupt import Stop, Stopped, stop_on_signal
from bnres.train.loop import LOOK_EVERY, NonFiniteLoss, TrainResult, evaluate, look, train_epoch
from bnres.train.outputs import (
    BEST,
    CONFIG,
    CURVES,
    LAST,
    NONFINITE,
    TENSORBOARD,
    draw_curves,
    write_curves,
    write_metrics,
)
from bnres.train.state import TrainState, build_state


class RunEnded(OSError):
    """Raised when a file can't be read or written. The message says which checkpoint is kept."""


@dataclass
class Run:
    """A run that is ready to train. Its data, options and model have been checked."""

    config: TrainConfig
    state: TrainState
    batches: EpochBatches


def prepare(config: TrainConfig, world: World | None = None) -> Run:
    """Loads the data, builds the model and, for a resumed run, loads the checkpoint.

    No files are written.

    Raises:
        ValueError: if the data, the model, the options and the checkpoint do not fit each other.
        ModuleNotFoundError: if ``config.tensorboard`` is set but tensorboard is missing. The extra
            ``bnres[tensorboard]`` installs it.
    """
    if config.tensorboard:
        importlib.import_module("tensorboard")
    dataset = load_dataset(config.dataset, config.data, checksum=config.checksum)
    state, batches = build_state(config, dataset, world)
    if config.resume is not None:
        load_checkpoint(config.resume, state, config)
    return Run(config, state, batches)


def route(config: TrainConfig) -> str:
    """Returns a description of what computes the batch norms, such as "fused layers, ATen"."""
    synchronised = "synchronised " if config.sync_bn else ""
    if not config.fused:
        return f"{synchronised}stock layers"
    names = {
        "triton": "fused layers, Triton kernels",
        "triton-interpreter": "fused layers, interpreted Triton kernels",
        "aten": "fused layers, ATen",
    }
    return synchronised + names[backend(config.device)]


def progress_bar(console: Console) -> Progress:
    """Returns a progress bar, which is shown only on a terminal and is removed at the end."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def run_epoch(
    run: Run,
    progress: Progress,
    label: str = "",
    folder: Path | None = None,
    stop: Stop | None = None,
) -> TrainResult:
    """Trains to the end of the epoch, evaluates, and adds a row to the history.

    Args:
        run: the run. Its state is updated.
        progress: the progress bar.
        label: text in front of the number of the epoch in the progress bar.
        folder: where checkpoints are written during the epoch. If it is None, none is written.
        stop: says whether a signal has asked the run to stop. It is ignored if ``folder`` is None.

    Raises:
        Stopped: if a signal asked the run to stop before the last batch of the epoch. A checkpoint
            has then been written.
        NonFiniteLoss: if the loss of a batch is infinite or NaN.
    """
    state, config = run.state, run.config
    first, start = state.batch, time.perf_counter()
    task = progress.add_task(
        f"{label}epoch {state.epoch + 1}/{config.epochs}",
        total=len(run.batches), completed=first, rate="",
    )  # fmt: skip

    memory = ""

    def on_batch() -> None:
        nonlocal memory
        # The peak memory is not read after each batch, because a reading is slow: torch collects
        # about a hundred statistics.
        if state.batch % LOOK_EVERY == 0 or state.batch == len(run.batches):
            memory = _memory(config)
        images = (state.batch - first) * config.batch_size
        rate = f"{images / (time.perf_counter() - start):,.0f} images/s{memory}"
        progress.update(task, completed=state.batch, rate=rate)
        if folder is None or state.batch % config.accumulate or state.batch == len(run.batches):
            return
        every = config.checkpoint_steps
        stops = state.world.any(stop is not None and stop.asked)
        due = every and (state.batch // config.accumulate) % every == 0
        if stops or due:
            look(state)  # a checkpoint of infinite or NaN weights must not replace a good one
            save_checkpoint(folder / LAST, state, config)
        if stops:
            raise Stopped

    if _on_gpu(config):
        torch.cuda.reset_peak_memory_stats(config.device)
    result = train_epoch(state, run.batches, config, on_batch)
    state.world.share_buffers(state.model, state.average and state.average.module)
    test_loss, test_accuracy = evaluate(state.evaluated, run.batches, config, state.world)
    progress.remove_task(task)
    state.history.append(
        {
            "epoch": state.epoch,
            "train_loss": result.loss,
            "train_accuracy": result.accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "learning_rate": float(state.scheduler.get_last_lr()[0]),
            "images_per_second": result.images_per_second,
            "images_per_second_without_wait": result.images_per_second_without_wait,
            "seconds": result.seconds,
            "peak_memory_bytes": _peak_memory(config),
        }
    )
    return result


def _on_gpu(config: TrainConfig) -> bool:
    return torch.device(config.device).type == "cuda"


def _peak_memory(config: TrainConfig) -> int:
    return torch.cuda.max_memory_allocated(config.device) if _on_gpu(config) else 0


def _memory(config: TrainConfig) -> str:
    return f", {_peak_memory(config) / 2**30:.1f} GiB" if _on_gpu(config) else ""


def epoch_line(row: dict[str, float], epochs: int) -> str:
    """Returns the line that is printed after an epoch."""
    return (
        f"epoch {row['epoch']:.0f}/{epochs}  train loss {row['train_loss']:.4f}  "
        f"train acc {row['train_accuracy']:.2%}  test acc {row['test_accuracy']:.2%}  "
        f"{row['images_per_second']:,.0f} images/s"
    )


def fit(run: Run, folder: Path, console: Console) -> None:
    """Trains for all remaining epochs.

    After each epoch, a line is printed, and checkpoints, metrics and curves are written to
    ``folder``.

    Raises:
        Stopped: if a signal asked the run to stop. A checkpoint has then been written.
        NonFiniteLoss: if the loss is infinite or NaN. Details are written to nonfinite.json.
        RunEnded: if a file can't be read or written, or the disk has no room for the checkpoints.
    """
    config, state = run.config, run.state
    console.print(
        f"{config.model} on {config.dataset}: {run.batches.train_count:,} training images, "
        f"{run.batches.test_count:,} held out; {config.device}, {config.dtype}, "
        f"{route(config)}",
        highlight=False,
    )
    first = state.world.is_first
    with _says_what_is_kept(folder, config.resume):
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / CONFIG, replace(config, resume=None).as_toml())
            check_room(folder, checkpoint_bytes(state))
        board: Any = nullcontext()
        if config.tensorboard and first:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(str(folder / TENSORBOARD))
        with progress_bar(console) as progress, stop_on_signal() as stop, board as writer:
            while state.epoch < config.epochs:
                try:
                    run_epoch(run, progress, folder=folder, stop=stop)
                except NonFiniteLoss as error:
                    if first:
                        write_text(folder / NONFINITE, json.dumps(facts(state), indent=1) + "\n")
                    raise NonFiniteLoss(f"{error}; details are in {folder / NONFINITE}") from error
                row = state.history[-1]
                console.print(epoch_line(row, config.epochs), highlight=False)
                if writer is not None:
                    for name in row.keys() - {"epoch"}:
                        writer.add_scalar(name, row[name], int(row["epoch"]))
                is_best = row["test_accuracy"] > state.best
                state.best = max(state.best, row["test_accuracy"])
                _write(folder, run, is_best)
                if state.world.any(stop.asked) and state.epoch < config.epochs:
                    raise Stopped
    console.print(f"checkpoints, metrics and {CURVES} are in {folder}", highlight=False)


def check_room(folder: Path, checkpoint: int) -> None:
    """Raises an OSError if the disk has no room for three checkpoints of ``checkpoint`` bytes each.

    They are last.pt, best.pt, and the temporary file to which a checkpoint is written first.
    """
    needed, free = 3 * checkpoint, shutil.disk_usage(folder).free
    needed -= sum(
        (folder / name).stat().st_size for name in (LAST, BEST) if (folder / name).exists()
    )
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"the checkpoints need {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free",
            str(folder),
        )


@contextmanager
def _says_what_is_kept(folder: Path, resumed: Path | None) -> Iterator[None]:
    """Turns an OSError into a `RunEnded` whose message says which checkpoint is kept."""
    try:
        yield
    except OSError as error:
        written = (folder / LAST, folder / BEST, *([] if resumed is None else [resumed]))
        kept = [path for path in written if path.exists()]
        advice = "there is no checkpoint yet"
        if kept:
            advice = (
                f"the last good checkpoint is kept; continue with: bnres train --resume {kept[0]}"
            )
        raise RunEnded(f"{describe(error)}; {advice}") from error


def _write(folder: Path, run: Run, is_best: bool) -> None:
    """Writes the files of an epoch, and last.pt after all others.

    If another file can't be written, the old last.pt remains, from which a resumed run repeats the
    epoch.
    """
    config, state = run.config, run.state
    if state.world.is_first:
        write_metrics(folder, state.history)
        title = f"{config.model} on {config.dataset}"
        write_curves(folder, draw_curves(state.history, title, config.label_smoothing))
    if is_best:
        save_checkpoint(folder / BEST, state, config)
    save_checkpoint(folder / LAST, state, config)


def facts(state: TrainState) -> dict[str, Any]:
    """Returns the content of nonfinite.json."""
    parameters = [p.detach() for p in state.model.parameters()]
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    return {
        "epoch": state.epoch + 1,
        "batch": state.batch,
        "losses": [_number(float(loss)) for loss in state.losses[-LOOK_EVERY:]],
        "learning_rate": [float(lr) for lr in state.scheduler.get_last_lr()],
        "loss_scale": state.scaler.get_scale(),
        "parameters_finite": all(bool(p.isfinite().all()) for p in parameters),
        "greatest_parameter": _number(max(float(p.abs().max()) for p in parameters if p.numel())),
        "gradients_finite": all(bool(g.isfinite().all()) for g in gradients),
    }


def _number(value: float) -> float | str:
    """Returns the value, or a string if the value is infinite or NaN, which JSON can't store."""
    return value if math.isfinite(value) else str(value)
