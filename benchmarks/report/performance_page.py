"""Writes the section of docs/performance.md from the committed results, if any, and the audits."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks.audit import budget
from benchmarks.byte_model import moved_bytes, passes
from benchmarks.environment import ROOT
from benchmarks.report import tables
from benchmarks.report.slices import OPERATION_TITLES, main_setting, subjects
from benchmarks.report.tables import markdown_table
from benchmarks.sites import RESNET18_SITES
from benchmarks.store import MADE_UP, Record, load
from bnres.files import write_text

PAGE = ROOT / "docs" / "performance.md"
RESULTS = Path(__file__).parent.parent / "results"
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
ITEMSIZE, BATCH = 2, 256
WIDTH = 100
# Bandwidth of the derived times, about that of a copy on an H200, in bytes/s.
DERIVED_COPY = 4.3e12
# MB that Inductor's code moves in the step of ``benchmarks.audit.budget.Found.traffic``: the
# buffers of each launch in the code that torch 2.15 generated for 132 multiprocessors without a
# GPU. The second is with the older max-pool backward, which gathers.
INDUCTOR, INDUCTOR_GATHERS = 18_846, 15_353
COLUMNS = ("bn_relu", "bn_add_relu", "bn_add_relu_fork", "dual_bn_add_relu", "bn_relu_pool")
STEPS = (
    ("forward", "forward, training"),
    ("backward", "backward"),
    ("eval", "forward, evaluation"),
)


def write() -> Path:
    """Writes the section between the page's markers; returns the page's path.

    Raises:
        ValueError: if the page lacks the markers.
    """
    write_text(PAGE, with_section(PAGE.read_text(encoding="utf-8")))
    return PAGE


def with_section(text: str) -> str:
    """Returns the page's text with the current section between its markers.

    Raises:
        ValueError: if the text lacks the markers.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} must contain the lines {BEGIN} and {END}")
    return f"{head}{BEGIN}\n\n{section()}\n\n{END}{tail}"


def section(results: Path = RESULTS) -> str:
    """Returns the section without its markers."""
    folders = latest(results)
    parts = [measured(folder, *load(folder)) for folder in folders] if folders else [unmeasured()]
    return "\n\n".join(_wrapped("\n\n".join([*parts, audited()]).split("\n\n")))


def _wrapped(parts: Sequence[str]) -> list[str]:
    """Wraps paragraphs at the page's width; leaves tables, titles and pictures as they are."""
    return [p if p[0] in "|#!" else textwrap.fill(p, WIDTH, break_on_hyphens=False) for p in parts]


def latest(results: Path) -> list[Path]:
    """Returns the newest folder of results for each GPU."""
    gpus = sorted(p for p in results.iterdir() if p.is_dir()) if results.exists() else []
    dates = [sorted(path.parent for path in gpu.glob("*/environment.json")) for gpu in gpus]
    return [folders[-1] for folders in dates if folders]


def measured(folder: Path, about: Record, records: Sequence[Record]) -> str:
    """Formats the results of a run: nets, then the operations of its main setting.

    Raises:
        ValueError: if the timings are made up.
    """
    if about["device"] == MADE_UP:
        raise ValueError(f"{folder} must have measured timings, got {MADE_UP}")
    parts = [tables.environment_line(about)]
    parts += [p for p in tables.nets(records) if not p.startswith("## ")]
    parts += [p for p in tables.memory(records) if not p.startswith("## ")]
    parts += [p for p in tables.augmentation(records) if not p.startswith("## ")]
    operations = subjects(records, "ops")
    if operations:
        shown = {subject.name for subject in main_setting(operations)}
        chosen = [r for r in records if r["suite"] == "ops" and r["subject"] in shown]
        parts += [p for p in tables.operations(chosen) if not p.startswith("## ")]
    for name in ("bandwidth", "step"):
        if (folder / f"{name}.png").exists():
            parts.append(f"![{name}]({os.path.relpath(folder / f'{name}.png', PAGE.parent)})")
    return "\n\n".join(parts)


def unmeasured() -> str:
    """Formats derived times, for a page without measured results."""
    rows = []
    for site in RESNET18_SITES:
        if site.operation == "bn":
            continue
        elements = BATCH * site.channels * site.size**2
        cells = [
            f"{moved_bytes(site.operation, step, elements, ITEMSIZE) / DERIVED_COPY * 1e6:.0f}"
            for step in ("forward", "backward")
        ]
        rows.append([f"{site.name}, {OPERATION_TITLES[site.operation]}", *cells])
    return "\n\n".join(
        [
            "There is no measured result yet: the kernels have not been run or timed on a GPU. "
            "`python -m benchmarks run` measures them on yours.",
            "Derived, not measured: the time in microseconds that the fewest bytes an operation "
            f"can move take at {DERIVED_COPY / 1e12} TB/s, about the bandwidth of a copy on an "
            "H200 (ResNet-18, batch 256, bf16).",
            markdown_table(["site", "forward, training", "backward"], rows),
        ]
    )


def audited() -> str:
    """Formats the results of the audits, from the recorded budget."""
    found = budget.load()
    counted = {
        (r["operation"], r["step"]): r["sectors"]
        for r in found.memory
        if r["layout"] == "channels_last"
    }
    rows = []
    for step, title in STEPS:
        cells = [
            f"{counted[name, step]:.4g} ({passes(name, step, ITEMSIZE):.5g})"
            if (name, step) in counted
            else "-"
            for name in COLUMNS
        ]
        rows.append([title, *cells])
    stock = found.held["stock"]
    moved = {kind: size / 1e6 for kind, size in found.traffic.items()}
    kernels = [
        r
        for r in found.kernels
        if r["gpu"] == "sm_90"
        and r["dtype"] == "bfloat16"
        and r["layout"] == "channels_last"
        and "finalize" not in r["kernel"]
    ]
    code = [
        [
            f"`{r['kernel']}`", str(r["registers"]), str(r["spills"]),
            f"{r['occupancy']:.0%}", r["matrix"] or "-",
        ]
        for r in kernels
    ]  # fmt: skip
    return "\n\n".join(
        [
            "Counted in the interpreter: the memory that an operation touches, in distinct 32-byte "
            "sectors. The unit is S, the bytes of one activation (bf16, channels_last). In "
            "brackets is the least that a fused operation with two passes can touch.",
            markdown_table(["", *(OPERATION_TITLES[name] for name in COLUMNS)], rows),
            "Apart from its convolutions, a training step of ResNet-18 (batch 256, 224×224, bf16, "
            f"channels_last) moves {moved['fused']:,.0f} MB fused and {moved['stock']:,.0f} MB "
            "with torch's own layers, counted from the operations that run. The code that "
            f"`torch.compile` generates for torch's layers moves {INDUCTOR:,} MB, or "
            f"{INDUCTOR_GATHERS:,} MB with Inductor's older max-pool backward, counted from the "
            "buffers of its launches (torch 2.15, without a GPU).",
            "A training forward of ResNet-18 (batch 256, 224×224, bf16) holds for its backward, "
            "counted without running it: "
            + ", ".join(
                f"{size / 1e6:,.0f} MB {title} ({size / stock:.2f})"
                for title, size in (
                    ("with torch's own layers", stock),
                    ("fused", found.held["fused"]),
                    ("fused inside `bnres.recompute()`", found.held["recompute"]),
                )
            )
            + ".",
            "Fused, a training step of ResNet-18 without the optimiser makes "
            f"{found.launches['fused, Triton']} launches of our kernels and "
            f"{found.launches['fused, ATen']} operations of ATen. With torch's own layers it makes "
            f"{found.launches['stock, ATen']} operations of ATen; 40 of them are the forward and "
            "backward of batch norms, and each of these makes several launches.",
            "Compiled for sm_90 without a GPU, in bf16 and channels_last: the worst of each "
            "kernel's specialisations in a step of ResNet-18 and in the convolutions of ResNet-18 "
            "and -50. `python -m benchmarks audit` compiles these again, also for sm_80, sm_100 "
            "and gfx942, and fails if one exceeds its recorded budget.",
            markdown_table(["kernel", "registers", "spills", "occupancy", "matrix"], code),
        ]
    )
