"""Writes the sections of docs/performance.md and README.md that show the committed results."""

import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks.audit import budget
from benchmarks.byte_model import passes
from benchmarks.environment import ROOT
from benchmarks.report import tables
from benchmarks.report.slices import OPERATION_TITLES, main_setting, subjects
from benchmarks.report.tables import markdown_table, speedups
from benchmarks.store import Record, load
from bnres.files import write_text

PAGE, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
PICTURES = ROOT / "docs" / "pictures"
RESULTS = Path(__file__).parent.parent / "results"
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
ITEMSIZE = 2
WIDTH = 100
# Counts in MB for the code that Inductor generates for ResNet-18, with the input that the audit
# uses (`benchmarks.audit.memory.NET_INPUT`). torch 2.15 generated the code without a GPU, for 132
# multiprocessors. The MB were counted from the tensors in this code.
# - INDUCTOR: moved in a training step, without its convolutions.
# - INDUCTOR_GATHERS: the same with Inductor's older max-pool backward, in which each element of the
#   input gathers its gradients.
# - INDUCTOR_INFERENCE: moved in a forward in evaluation, without its convolutions.
# - INDUCTOR_HELD: saved for backward in a training step, with the images. Counted from the graphs
#   that AOTAutograd of torch 2.13 gives Inductor.
INDUCTOR, INDUCTOR_GATHERS, INDUCTOR_INFERENCE, INDUCTOR_HELD = 18_846, 15_353, 3_250, 2_267
# The README shows the training steps whose records have these values.
HEADLINE = {
    "net": "resnet18", "image": 224, "launch": "graph", "dtype": "bf16", "layout": "channels_last",
}  # fmt: skip
COLUMNS = ("bn_relu", "bn_add_relu", "bn_add_relu_fork", "dual_bn_add_relu", "bn_relu_pool")
STEPS = (
    ("forward", "forward, training"),
    ("backward", "backward"),
    ("eval", "forward, evaluation"),
)


def write() -> list[Path]:
    """Writes the sections of both pages and copies the pictures. Returns the pages' paths.

    Raises:
        ValueError: if a page lacks the markers.
    """
    pages = {PAGE: section(), README: headline()}
    for page, text in pages.items():
        write_text(page, with_section(page, text))
    for folder in latest(RESULTS):
        for picture in pictures_of(folder):
            shutil.copyfile(picture, PICTURES / _copy_of(picture))
    return list(pages)


def with_section(page: Path, inside: str) -> str:
    """Returns a page's text with ``inside`` between its markers.

    Raises:
        ValueError: if the page lacks the markers.
    """
    text = page.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} must contain the lines {BEGIN} and {END}")
    return f"{head}{BEGIN}\n\n{inside}\n\n{END}{tail}"


def section(results: Path = RESULTS) -> str:
    """Returns the section of docs/performance.md, without its markers."""
    parts = [measured(folder, *load(folder)) for folder in latest(results)]
    return "\n\n".join(_wrapped("\n\n".join([*parts, audited()]).split("\n\n")))


def _wrapped(parts: Sequence[str]) -> list[str]:
    """Wraps paragraphs at the page's width, but not tables, titles and pictures."""
    return [p if p[0] in "|#!" else textwrap.fill(p, WIDTH, break_on_hyphens=False) for p in parts]


def latest(results: Path) -> list[Path]:
    """Returns the newest folder of results for each GPU."""
    gpus = sorted(p for p in results.iterdir() if p.is_dir()) if results.exists() else []
    dates = [sorted(path.parent for path in gpu.glob("*/environment.json")) for gpu in gpus]
    return [folders[-1] for folders in dates if folders]


def measured(folder: Path, about: Record, records: Sequence[Record]) -> str:
    """Formats a run's results: operations only in the most common layout, dtype and batch size."""
    parts = [tables.environment_line(about)]
    sections = tables.nets(records) + tables.memory(records) + tables.augmentation(records)
    operations = subjects(records, "ops")
    if operations:
        shown = {subject.name for subject in main_setting(operations)}
        chosen = [r for r in records if r["suite"] == "ops" and r["subject"] in shown]
        sections += tables.operations(chosen)
    parts += [p for p in sections if not p.startswith("## ")]
    parts += [f"![{p.stem}]({PICTURES.name}/{_copy_of(p)})" for p in pictures_of(folder)]
    return "\n\n".join(parts)


def pictures_of(folder: Path) -> list[Path]:
    """Returns the paths of the pictures in ``folder`` that docs/performance.md shows."""
    paths = (folder / f"{name}.png" for name in ("speedup", "bandwidth"))
    return [path for path in paths if path.exists()]


def _copy_of(picture: Path) -> str:
    """Returns the file name of a picture's copy in ``PICTURES``."""
    return f"{picture.parent.parent.name}-{picture.name}"


def headline(results: Path = RESULTS) -> str:
    """Returns the README's section: ResNet-18's training step on each GPU."""
    rows = []
    for folder in latest(results):
        about, records = load(folder)
        for subject in subjects(records, "step"):
            record = subject.any
            if all(record[name] == value for name, value in HEADLINE.items()):
                found = [subject.records.get(name) for name in ("eager", "compile", "bnres")]
                times = ["-" if r is None else f"{r['median'] * 1e3:.2f} ms" for r in found]
                rows.append([about["device"], str(record["batch"]), *times, *speedups(subject)])
    titles = ["GPU", "batch", "torch", "torch.compile", "bnres", "vs. torch", "vs. torch.compile"]
    return markdown_table(titles, rows)


def audited() -> str:
    """Formats the results of the audits, from the recorded budget."""
    found, _ = budget.load()
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
    stock, fused, recompute = (found.held[kind] for kind in ("stock", "fused", "recompute"))
    moved = {kind: size / 1e6 for kind, size in found.traffic.items()}
    sizes = {
        "traffic, training step": (moved["stock"], INDUCTOR, moved["fused"], None),
        "traffic, inference": (
            moved["stock inference"], INDUCTOR_INFERENCE, moved["fused inference"], None,
        ),
        "stored for backward": (stock / 1e6, INDUCTOR_HELD, fused / 1e6, recompute / 1e6),
    }  # fmt: skip
    kernels = [
        r
        for r in found.kernels
        if r["gpu"] == "sm_90"
        and r["dtype"] == "bfloat16"
        and r["layout"] == "channels_last"
        and "finalize" not in r["kernel"]
    ]
    code = [[f"`{r['kernel']}`", str(r["registers"]), str(r["spills"])] for r in kernels]
    return "\n\n".join(
        [
            "The next table shows how much memory each operation touches, as a multiple of the "
            "size of one activation tensor (bf16, channels_last). Triton's interpreter counts the "
            "memory of each launch, in whole sectors of 32 bytes. The number in brackets is the "
            "least that a fused operation with two passes over memory can touch.",
            markdown_table(["", *(OPERATION_TITLES[name] for name in COLUMNS)], rows),
            "The next table shows ResNet-18 (batch 256, 224×224, bf16, channels_last). Traffic is "
            "the memory that all operations except convolutions read and write. The last row is "
            "the memory that forward stores for backward, including the images. All numbers are in "
            "MB.",
            markdown_table(
                ["", "torch", "torch.compile", "bnres", "bnres, `recompute()`"],
                [[name, *(f"{n:,.0f}" if n else "-" for n in row)] for name, row in sizes.items()],
            ),
            "For torch and bnres, the operations that run are counted. The numbers for bnres leave "
            "out 260 to 290 MB (derived), which the fused net moves in a training step on a GPU to "
            "rearrange the input of its first convolution. For `torch.compile`, the traffic is "
            "counted from the code that torch 2.15 generated without a GPU, and the memory stored "
            "for backward from the graphs that torch 2.13 gives Inductor. With Inductor's older "
            "max-pool backward, the training step of `torch.compile` moves less: "
            f"{INDUCTOR_GATHERS:,} MB.",
            "A fused training step of ResNet-18, without the optimiser, launches our kernels "
            f"{found.launches['fused, Triton']} times and calls {found.launches['fused, ATen']} "
            "operations of ATen. With torch's own layers the step calls "
            f"{found.launches['stock, ATen']} operations of ATen. 40 of them are the forward or "
            "the backward of a batch norm. Each of these 40 launches several kernels.",
            "The next table shows properties of each kernel's machine code, compiled without a GPU "
            "for sm_90, bf16 and channels_last. The kernels are those of a training step of "
            "ResNet-18 and of the convolutions of ResNet-18 and ResNet-50. Triton compiles a "
            "kernel several times, for arguments with different properties. A row shows the "
            "highest numbers of these versions. `python -m benchmarks audit` compares the numbers "
            "with a recorded budget, also for sm_80, sm_100 and gfx942.",
            markdown_table(["kernel", "registers", "spills"], code),
        ]
    )
