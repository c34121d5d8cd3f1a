"""The style of all pictures. The colours are safe for colour-blind people."""

import io
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bnres.files import write_bytes


@dataclass(frozen=True)
class Mark:
    """A colour and a hatch. The colour is from Okabe and Ito's palette, or is a grey."""

    color: str
    hatch: str = ""


PROVIDER_MARKS = {
    "bnres": Mark("#0072B2"),
    "bnres-recompute": Mark("#56B4E9", "xx"),
    "bnres-conv-kernel": Mark("#56B4E9", "--"),
    "eager": Mark("#999999"),
    "eager-fp16-cudnn": Mark("#CCCCCC", "\\\\"),
    "compile": Mark("#E69F00", "//"),
    "compile-max-autotune": Mark("#D55E00", "xx"),
    "cudnn-frontend": Mark("#009E73", ".."),
}
DPI = 150


def new_figure(width: float, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Returns a figure and its ``rows`` axes, one below the other."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", alpha=0.3)
        each.set_axisbelow(True)
    return figure, list(axes)


def save(figure: Figure, path: Path) -> Path:
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], dpi=DPI)
    write_bytes(path, content.getbuffer())
    return path
