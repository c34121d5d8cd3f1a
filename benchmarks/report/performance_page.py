"""The section of docs/performance.md: from the committed results, or without any from the audits."""

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
# What the derived floors are reckoned with: an H200's copy bandwidth, in bytes/s.
DERIVED_COPY = 4.3e12
# What Inductor moves in the step of `Found.traffic`, in MB: the buffers of each launch that torch 2.15
# generated for 132 multiprocessors, without a GPU. The second is of its max-pool backward by gathering.
INDUCTOR, INDUCTOR_GATHERS = 18_846, 15_353
COLUMNS = ("bn_relu", "bn_add_relu", "bn_add_relu_fork", "dual_bn_add_relu", "bn_relu_pool")
STEPS = (
    ("forward", "forward, training"),
    ("backward", "backward"),
    ("eval", "forward, evaluation"),
)


def write() -> Path:
    """Puts the section between the page's markers; returns the page's path.

    Raises:
        ValueError: if the page lacks the markers.
    """
    write_text(PAGE, with_section(PAGE.read_text(encoding="utf-8")))
    return PAGE


def with_section(text: str) -> str:
    """The page with the section as of today."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} must hold the lines {BEGIN} and {END}")
    return f"{head}{BEGIN}\n\n{section()}\n\n{END}{tail}"


def section(results: Path = RESULTS) -> str:
    """The section without its markers."""
    folders = latest(results)
    parts = [measured(folder, *load(folder)) for folder in folders] if folders else [unmeasured()]
    return "\n\n".join(_wrapped("\n\n".join([*parts, audited()]).split("\n\n")))


def _wrapped(parts: Sequence[str]) -> list[str]:
    """Paragraphs in lines of the page's width; tables and titles as they are."""
    return [p if p[0] in "|#!" else textwrap.fill(p, WIDTH, break_on_hyphens=False) for p in parts]


def latest(results: Path) -> list[Path]:
    """The newest folder of results of each GPU."""
    gpus = sorted(p for p in results.iterdir() if p.is_dir()) if results.exists() else []
    dates = [sorted(path.parent for path in gpu.glob("*/environment.json")) for gpu in gpus]
    return [folders[-1] for folders in dates if folders]


def measured(folder: Path, about: Record, records: Sequence[Record]) -> str:
    """What one run found: nets, then the sites of its main setting.

    Raises:
        ValueError: if nobody measured it.
    """
    if about["device"] == MADE_UP:
        raise ValueError(f"{folder} holds {MADE_UP}, and the page only takes measured ones")
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
    """Derived floors, called derived."""
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
            "Derived, not measured: the time that the least bytes of an operation take at "
            f"{DERIVED_COPY / 1e12} TB/s, about what a copy reaches on an H200; microseconds, "
            "ResNet-18, batch 256, bf16.",
            markdown_table(["site", "forward, training", "backward"], rows),
        ]
    )


def audited() -> str:
    """What the audits counted, from the recorded budget."""
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
            "Counted in the interpreter: the memory that an operation touches in distinct 32-byte "
            "sectors, in S, the bytes of one activation (bf16, channels_last); in brackets the "
            "least that a fused operation of two passes can.",
            markdown_table(["", *(OPERATION_TITLES[name] for name in COLUMNS)], rows),
            "A training step of ResNet-18 at batch 256, 224×224, bf16, channels_last, moves besides its "
            f"convolutions {moved['fused']:,.0f} MB fused and {moved['stock']:,.0f} MB with torch's own "
            "layers, counted from the operations that run. The code that `torch.compile` generates for "
            f"torch's layers moves {INDUCTOR:,} MB, {INDUCTOR_GATHERS:,} with Inductor's older max-pool "
            "backward, counted from the buffers of its launches (torch 2.15, without a GPU).",
            "What a training forward of ResNet-18 holds for its backward at batch 256, 224×224, "
            "bf16, counted without running it: "
            + ", ".join(
                f"{size / 1e6:,.0f} MB {title} ({size / stock:.2f})"
                for title, size in (
                    ("of torch's own layers", stock),
                    ("fused", found.held["fused"]),
                    ("inside `bnres.recompute()`", found.held["recompute"]),
                )
            )
            + ".",
            "A training step of ResNet-18, without the optimiser, is "
            f"{found.launches['fused, Triton']} launches of our kernels and "
            f"{found.launches['fused, ATen']} operations of ATen; with torch's own layers it is "
            f"{found.launches['stock, ATen']} of these, of which each of 40 batch norms, forward and "
            "backward, makes several launches.",
            "Compiled for sm_90 with no GPU, in bf16 and channels_last, the worst of each kernel's specialisations in a "
            "ResNet-18 step and in the convolutions of ResNet-18 and -50; "
            "`python -m benchmarks audit` compiles them anew, for sm_80, sm_100 and gfx942 too, and "
            "fails where one exceeds its recorded budget.",
            markdown_table(["kernel", "registers", "spills", "occupancy", "matrix"], code),
        ]
    )
