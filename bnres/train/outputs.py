"""What a run leaves in its folder: metrics.csv, metrics.jsonl, curves.png, TensorBoard's files."""

import csv
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLUMNS = (
    "epoch",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "learning_rate",
    "images_per_second",
    "images_per_second_without_wait",
    "seconds",
    "peak_memory_bytes",
)
METRICS = "metrics"
LAST, BEST, CONFIG, CURVES = "last.pt", "best.pt", "config.toml", "curves.png"


def write_metrics(folder: Path, history: list[dict[str, float]]) -> None:
    """metrics.csv and metrics.jsonl, a line an epoch, columns as in ``COLUMNS``."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, COLUMNS)
    writer.writeheader()
    writer.writerows(history)
    write_text(folder / f"{METRICS}.csv", table.getvalue())
    write_text(folder / f"{METRICS}.jsonl", "".join(json.dumps(row) + "\n" for row in history))


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    os.replace(temporary, path)


class TensorBoard:
    """An epoch's row as TensorBoard's scalars."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def add(self, row: dict[str, float]) -> None:
        for name, value in row.items():
            if name != "epoch":
                self.writer.add_scalar(name, value, int(row["epoch"]))


@contextmanager
def open_tensorboard(folder: Path) -> Iterator[TensorBoard]:
    """TensorBoard's files below ``folder``.

    Raises:
        ModuleNotFoundError: if tensorboard is not installed.
    """
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as writer:
        yield TensorBoard(writer)


def draw_curves(path: Path, history: list[dict[str, float]], title: str) -> None:
    """Train loss, train accuracy and test accuracy over the epochs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    # Colours of Okabe and Ito, told apart by the colour-blind; line styles for print.
    for column, color, style in (
        ("train_loss", "#0072B2", "-"),
        ("train_accuracy", "#D55E00", "--"),
        ("test_accuracy", "#009E73", "-."),
    ):
        values = [row[column] for row in history]
        axes.plot(epochs, values, style, color=color, marker="o", label=column.replace("_", " "))
    axes.set(title=title, xlabel="epoch", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=150)
    os.replace(temporary, path)
