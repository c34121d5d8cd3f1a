"""A whole training run: epochs, lines on the screen, files in the run's folder."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bnres.backend import backend
from bnres.data import load_dataset
from bnres.train.checkpoint import load_checkpoint, save_checkpoint
from bnres.train.config import TrainConfig
from bnres.train.loop import TrainResult, evaluate, train_epoch
from bnres.train.outputs import draw_curves, write_metrics
from bnres.train.state import AnyBatches, TrainState, build_state

CHECKPOINT, METRICS, CURVES = "checkpoint.pt", "metrics.csv", "curves.png"


@dataclass
class Run:
    """A run that is ready to train: everything that can be wrong with its input has been checked."""

    config: TrainConfig
    state: TrainState
    batches: AnyBatches


def prepare(config: TrainConfig) -> Run:
    """Loads the data, builds the model, reads the checkpoint.

    Raises:
        ValueError: if the input does not fit; nothing has been written.
    """
    state, batches = build_state(
        config, load_dataset(config.dataset, config.data, checksum=config.checksum)
    )
    if config.resume is not None:
        load_checkpoint(config.resume, state, config)
    return Run(config, state, batches)


def route(config: TrainConfig) -> str:
    """Which implementation the batch norms of a run take."""
    if not config.fused:
        return "stock layers"
    names = {
        "triton": "fused layers, Triton kernels",
        "triton-interpreter": "fused layers, interpreted Triton kernels",
        "aten": "fused layers, ATen",
    }
    return names[backend(config.device)]


def progress_bar(console: Console) -> Progress:
    """A bar that vanishes when it is full, and never shows where there is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def run_epoch(run: Run, progress: Progress, label: str = "") -> TrainResult:
    """Trains and evaluates for one epoch, and adds its line to the history."""
    state, config = run.state, run.config
    learning_rate = float(state.scheduler.get_last_lr()[0])
    task = progress.add_task(
        f"{label}epoch {state.epoch + 1}/{config.epochs}", total=len(run.batches)
    )
    result = train_epoch(state, run.batches, config, lambda: progress.advance(task))
    test_loss, test_accuracy = evaluate(state.model, run.batches, config)
    progress.remove_task(task)
    state.history.append(
        {
            "epoch": state.epoch,
            "train_loss": result.loss,
            "train_accuracy": result.accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "learning_rate": learning_rate,
            "images_per_second": result.images_per_second,
            "seconds": result.seconds,
        }
    )
    return result


def describe(row: dict[str, float], epochs: int) -> str:
    """The line an epoch leaves on the screen."""
    return (
        f"epoch {row['epoch']:.0f}/{epochs}  train loss {row['train_loss']:.4f}  "
        f"train acc {row['train_accuracy']:.2%}  test acc {row['test_accuracy']:.2%}  "
        f"{row['images_per_second']:,.0f} images/s"
    )


def fit(run: Run, folder: Path, console: Console) -> None:
    """Trains to the end; after each epoch ``folder`` holds checkpoint, metrics and curves."""
    config, state = run.config, run.state
    console.print(
        f"{config.model} on {config.dataset}: {run.batches.train_count:,} images to train, "
        f"{run.batches.test_count:,} held out; {config.device}, {config.dtype}, "
        f"{route(config)}",
        highlight=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with progress_bar(console) as progress:
        while state.epoch < config.epochs:
            run_epoch(run, progress)
            console.print(describe(state.history[-1], config.epochs), highlight=False)
            save_checkpoint(folder / CHECKPOINT, state, config)
            write_metrics(folder / METRICS, state.history)
            draw_curves(folder / CURVES, state.history, f"{config.model} on {config.dataset}")
    console.print(f"{CHECKPOINT}, {METRICS} and {CURVES} are in {folder}", highlight=False)
