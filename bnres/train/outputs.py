"""Names the files of a run's folder, and writes metrics.csv, metrics.jsonl and curves.png."""

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from bnres.files import TEMPORARY, write_bytes, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = "metrics"
LAST, BEST, CONFIG, CURVES = "last.pt", "best.pt", "config.toml", "curves.png"
NONFINITE, TENSORBOARD = "nonfinite.json", "tensorboard"
BEFORE_CHECKPOINT = {CONFIG, CURVES, NONFINITE, TENSORBOARD, f"{METRICS}.csv", f"{METRICS}.jsonl"}


def has_no_checkpoint(folder: Path) -> bool:
    """Whether a folder holds only files that a run writes before its first checkpoint."""
    names = {path.name for path in folder.iterdir() if not path.name.endswith(TEMPORARY)}
    return names <= BEFORE_CHECKPOINT


def write_metrics(folder: Path, history: list[dict[str, float]]) -> None:
    """Writes metrics.csv and metrics.jsonl, with a line for each epoch."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, history[0])
    writer.writeheader()
    writer.writerows(history)
    write_text(folder / f"{METRICS}.csv", table.getvalue())
    write_text(folder / f"{METRICS}.jsonl", "".join(json.dumps(row) + "\n" for row in history))


def draw_curves(history: list[dict[str, float]], title: str, label_smoothing: float) -> "Figure":
    """Plots loss and accuracy by epoch, for the training images and the held-out set."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(title)
    smoothing = f", label smoothing {label_smoothing:g}" if label_smoothing else ""
    # Colours of Okabe and Ito, which colour-blind readers can tell apart. The line styles differ,
    # for prints in black and white.
    styles = {"train": ("#0072B2", "-"), "test": ("#009E73", "--")}
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for part, (color, style) in styles.items():
            note = smoothing if (part, quantity) == ("train", "loss") else ""
            values = [row[f"{part}_{quantity}"] for row in history]
            axes.plot(epochs, values, style, color=color, marker="o", label=f"{part}{note}")
        axes.set(xlabel="epoch", ylabel=quantity, ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def write_curves(folder: Path, figure: "Figure") -> None:
    """Writes a figure to curves.png in ``folder``."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_bytes(folder / CURVES, content.getbuffer())
