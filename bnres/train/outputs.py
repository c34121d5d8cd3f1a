"""What a run leaves in its folder: metrics.csv and curves.png."""

import csv
import os
from pathlib import Path

COLUMNS = (
    "epoch",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "learning_rate",
    "images_per_second",
    "seconds",
)


def write_metrics(path: Path, history: list[dict[str, float]]) -> None:
    """One line an epoch, columns as in ``COLUMNS``."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(history)
    os.replace(temporary, path)


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
