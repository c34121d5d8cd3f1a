"""Draws a run's results as pictures."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report.slices import (
    BASELINE,
    Subject,
    main_setting,
    providers_in,
    subjects,
)
from benchmarks.report.style import PROVIDER_MARKS, new_figure, save
from benchmarks.report.tables import DIRECTION_TITLES
from benchmarks.store import Record

# If a panel had more groups of bars than this, it would be unreadable.
MOST_SITES = 16
SHORT_TITLES = {
    "bn": "BN",
    "bn_relu": "BN+ReLU",
    "bn_add_relu": "BN+add\n+ReLU",
    "bn_add_relu_fork": "BN+add\n+ReLU, two\ngradients",
    "dual_bn_add_relu": "BN+BN\n+add+ReLU",
    "bn_relu_pool": "BN+ReLU\n+max-pool",
    "conv_bn_relu": "+BN+ReLU",
    "conv_bn_add_relu": "+BN+add\n+ReLU",
}
Panel = tuple[str, list[Subject]]


def draw(folder: Path, about: Record, records: Sequence[Record]) -> list[Path]:
    """Draws the measured bandwidths and speed-ups of operations. Returns the files."""
    drawn = []
    operations = subjects(records, "ops")
    norms = [s for s in operations if not _is_conv(s)]
    if norms:
        drawn.append(bandwidth(folder / "bandwidth.png", about, norms))
    compared = [s for s in operations if BASELINE in s.records and len(s.records) > 1]
    if compared:
        drawn.append(speedup(folder / "speedup.png", about, compared))
    return drawn


def bandwidth(path: Path, about: Record, found: Sequence[Subject]) -> Path:
    """Draws each provider's bandwidth for each operation, and a copy's bandwidth as a line."""
    panels = _panels(main_setting(list(found)))
    ceiling = about["ceilings"]["copy"] / 1e9
    figure, all_axes = _site_figure("Bandwidth", about, panels)
    providers = providers_in(s for _, shown in panels for s in shown)
    for axes, (_, shown) in zip(all_axes, panels, strict=True):
        _bars(
            axes, providers, [_site_label(s) for s in shown],
            [[_of(s, p, "bytes_per_second", 1e-9) for s in shown] for p in providers],
        )  # fmt: skip
        axes.axhline(ceiling, color="black", linewidth=1)
        axes.annotate(
            f"copy {ceiling:,.0f} GB/s", (1, ceiling), xycoords=("axes fraction", "data"),
            ha="right", va="bottom", fontsize=8,
        )  # fmt: skip
        axes.set_ylabel("fewest bytes / time, GB/s")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return save(figure, path)


def speedup(path: Path, about: Record, found: Sequence[Subject]) -> Path:
    """Draws each provider's speed-up over torch's eager layers, for each operation."""
    panels = _panels(main_setting(list(found)))
    figure, all_axes = _site_figure("Speed-up over eager", about, panels)
    providers = [p for p in providers_in(s for _, shown in panels for s in shown) if p != BASELINE]
    for axes, (_, shown) in zip(all_axes, panels, strict=True):
        _bars(
            axes, providers, [_site_label(s) for s in shown],
            [[s.ratio(p) or 0.0 for s in shown] for p in providers],
        )  # fmt: skip
        axes.axhline(1, color="black", linewidth=1)
        axes.set_ylabel("times as fast as eager")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return save(figure, path)


def _is_conv(subject: Subject) -> bool:
    return str(subject.any["operation"]).startswith("conv")


def _panels(found: Sequence[Subject]) -> list[Panel]:
    """Returns the panels of the first net: one for each direction, and one for convolutions."""
    nets = [_net_of(s) for s in found]
    shown = [s for s in found if _net_of(s) == nets[0]]
    panels = [
        (title, [s for s in shown if s.any["direction"] == direction and not _is_conv(s)])
        for direction, title in DIRECTION_TITLES.items()
    ]
    panels.append(("convolution with its epilogue (evaluation)", [s for s in shown if _is_conv(s)]))
    return [(title, group[:MOST_SITES]) for title, group in panels if group]


def _net_of(subject: Subject) -> str:
    return str(subject.any["site"]).split(".")[0]


def _site_figure(what: str, about: Record, panels: Sequence[Panel]) -> tuple[Figure, list[Axes]]:
    first = panels[0][1][0]
    record = first.any
    small = ", small inputs" if record["smoke"] else f", batch {record['batch']}"
    figure, all_axes = new_figure(11, 3.0 * len(panels) + 0.8, len(panels))
    figure.suptitle(
        f"{what}: {_net_of(first)}, {record['dtype']}, {record['layout']}{small}; "
        f"{about['device']}", fontsize=11,
    )  # fmt: skip
    for axes, (title, _) in zip(all_axes, panels, strict=True):
        axes.set_title(title, loc="left", fontsize=10)
    return figure, all_axes


def _site_label(subject: Subject) -> str:
    """Returns a label of a few short lines: the place in the net, and the operation."""
    record = subject.any
    place = str(record["site"]).split(".", 1)[1].replace("-", "\n", 1)
    return f"{place}\n{SHORT_TITLES[record['operation']]}"


def _bars(
    axes: Axes, providers: Sequence[str], labels: Sequence[str], rows: Sequence[Sequence[float]]
) -> None:
    """Draws a group of bars for each label, with one bar for each provider."""
    width = 0.8 / max(len(providers), 1)
    for index, (provider, values) in enumerate(zip(providers, rows, strict=True)):
        mark = PROVIDER_MARKS[provider]
        offset = (index - (len(providers) - 1) / 2) * width
        axes.bar(
            [i + offset for i in range(len(labels))], values, width, label=provider,
            color=mark.color, hatch=mark.hatch, edgecolor="black", linewidth=0.4,
        )  # fmt: skip
    axes.set_xticks(range(len(labels)), labels, fontsize=7)


def _of(subject: Subject, provider: str, key: str, scale: float) -> float:
    record = subject.records.get(provider)
    return record.get(key, 0.0) * scale if record else 0.0
