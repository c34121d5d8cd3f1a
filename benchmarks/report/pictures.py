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
    steps_with_groups,
    subjects,
)
from benchmarks.report.style import GROUP_MARKS, PROVIDER_MARKS, new_figure, save
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
# bnres runs the addition and the activation in the batch norm's kernels. With other providers these
# are separate kernels, which the picture shows as "rest".
GROUP_TITLES = {"batch norm": "batch norm and what is fused with it"}
Panel = tuple[str, list[Subject]]


def draw(folder: Path, about: Record, records: Sequence[Record]) -> list[Path]:
    """Draws bandwidth, speed-up, step times and memory, if there are results. Returns the files."""
    drawn = []
    operations = subjects(records, "ops")
    norms = [s for s in operations if not _is_conv(s)]
    if norms:
        drawn.append(bandwidth(folder / "bandwidth.png", about, norms))
    compared = [s for s in operations if BASELINE in s.records and len(s.records) > 1]
    if compared:
        drawn.append(speedup(folder / "speedup.png", about, compared))
    steps = subjects(steps_with_groups(records), "step")
    if steps:
        drawn.append(step_time(folder / "step.png", about, steps))
    memory = subjects(records, "memory")
    if memory:
        drawn.append(step_memory(folder / "memory.png", about, memory))
    return drawn


def bandwidth(path: Path, about: Record, found: Sequence[Subject]) -> Path:
    """Draws the bandwidth of each operation by provider, and a copy's bandwidth as a line."""
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
    """Draws the speed-up of each operation over torch's eager layers, by provider."""
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
    """Returns a panel for each direction of the first net's operations, and for convolutions."""
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
    """Returns a label of a few short lines. They name the stage of the net and the operation."""
    record = subject.any
    place = str(record["site"]).split(".", 1)[1].replace("-", "\n", 1)
    return f"{place}\n{SHORT_TITLES[record['operation']]}"


def step_time(path: Path, about: Record, found: Sequence[Subject]) -> Path:
    """Draws a training step's time by provider, divided into the parts of `step_parts`."""
    count = sum(len(s.records) for s in found)
    figure, (axes,) = new_figure(9, 0.28 * count + 0.42 * len(found) + 1.3)
    place = 0.0
    places: list[float] = []
    labels: list[str] = []
    for subject in found:
        place += 1.5
        axes.annotate(
            _net_label(subject.any), (0, -place + 0.15), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=9, fontweight="bold",
        )  # fmt: skip
        for provider in providers_in([subject]):
            place += 1
            record, left = subject.records[provider], 0.0
            for group, seconds in step_parts(record).items():
                mark = GROUP_MARKS[group]
                axes.barh(
                    -place, seconds * 1e3, left=left, color=mark.color, hatch=mark.hatch,
                    edgecolor="black", linewidth=0.5,
                    label=None if places else GROUP_TITLES.get(group, group),
                )  # fmt: skip
                left += seconds * 1e3
            axes.annotate(
                f" {record['median'] * 1e3:,.1f} ms", (left, -place), va="center", fontsize=8
            )
            places.append(-place)
            labels.append(provider)
    axes.set_yticks(places, labels, fontsize=8)
    axes.set_ylim(-place - 0.7, -0.7)
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.3)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("ms per step")
    axes.set_title(f"Training step; {about['device']}", loc="left", fontsize=11)
    figure.legend(loc="outside lower center", ncols=4)
    return save(figure, path)


def step_parts(record: Record) -> dict[str, float]:
    """Returns the seconds of convolutions, batch norms, other kernels, and gaps between kernels."""
    groups = record["groups"]
    parts = {name: groups[name] for name in ("convolution", "batch norm")}
    parts["rest"] = sum(groups.values()) - sum(parts.values())
    return parts | {"between kernels": max(record["median"] - sum(groups.values()), 0.0)}


def step_memory(path: Path, about: Record, found: Sequence[Subject]) -> Path:
    """Draws by provider the peak memory of a training step, and the memory held for backward."""
    providers = providers_in(found)
    figure, panels = new_figure(8, 5.6, 2)
    for axes, (key, title) in zip(
        panels,
        (("peak_bytes", "peak of a step"), ("held_bytes", "held for backward")),
        strict=True,
    ):
        _bars(
            axes, providers, [_net_label(s.any) for s in found],
            [[_of(s, p, key, 1e-6) for s in found] for p in providers],
        )  # fmt: skip
        axes.set_ylabel("MB")
        axes.set_title(title, loc="left", fontsize=10)
    figure.suptitle(f"Memory of a training step, {about['device']}", fontsize=11)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return save(figure, path)


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


def _net_label(record: Record) -> str:
    graph = ", graph" if record["launch"] == "graph" else ""
    return f"{record['net']} {record['image']}px b{record['batch']}{graph}"
