"""Formats a run's results as Markdown."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.report.slices import (
    OPERATION_TITLES,
    Subject,
    providers_in,
    setting,
    subjects,
)
from benchmarks.store import Record

DIRECTION_TITLES = {
    "forward": "forward (training)",
    "backward": "backward",
    "eval": "forward (evaluation)",
}
LEGEND = (
    "The times are medians in microseconds. A site is a place in a net where the operation occurs. "
    "The number in brackets is the shortest possible time divided by the median. The shortest "
    "possible time is the fewest bytes that the fused operation must move, divided by the measured "
    "bandwidth of a copy. For a convolution it can also be the number of FLOPs divided by the "
    "measured speed of a matrix product; the longer of the two times is used. Operations on small "
    "tensors can exceed 100%, because these tensors stay in the L2 cache. The columns 'vs. eager' "
    "and 'vs. compile' are the speed-ups of bnres over torch's own layers and over torch.compile. "
    "The column 'host' is the time for which a call of bnres occupies the CPU. This time does not "
    "matter if calls are replayed from a CUDA graph, or if the GPU is still busy with earlier "
    "calls."
)

IDLE_NOTE = (
    " Idle is the share of a training loop's time in which the GPU waits for the CPU. It is 1 - "
    "(time of a step replayed from a CUDA graph) / (time of a step in the loop)."
)


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table. All columns except the first are right-aligned."""
    lines = ["| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def report(about: Record, records: Sequence[Record], pictures: Sequence[Path]) -> str:
    """Formats the whole report.

    Args:
        about: environment of the run.
        records: records of the run.
        pictures: files of pictures in the report's folder.
    """
    sections = ["# Benchmarks", environment_line(about)]
    sections += [f"![{picture.stem}]({picture.name})" for picture in pictures]
    sections += operations(records)
    sections += nets(records)
    sections += memory(records)
    sections += augmentation(records)
    sections += notes(records)
    sections += absent(records)
    return "\n\n".join(sections) + "\n"


def environment_line(about: Record) -> str:
    """Describes the environment of a run, and the speed of a copy and of a matrix product."""
    versions = ", ".join(
        f"{name} {about[key]}"
        for name, key in (
            ("driver", "driver"), ("CUDA", "cuda"), ("cuDNN", "cudnn"), ("torch", "torch"),
            ("triton", "triton"), ("Python", "python"),
        )
        if about.get(key)
    )  # fmt: skip
    ceilings = about["ceilings"]
    return (
        f"{about['device']}; {versions}; commit {about['commit']}, {about['date'][:10]}. "
        f"In the same run a copy was measured at {ceilings['copy'] / 1e9:,.0f} GB/s, counting both "
        "the bytes read and the bytes written, and a matrix product at "
        f"{ceilings['product'] / 1e12:,.2f} TFLOP/s."
    )


def speedups(subject: Subject) -> list[str]:
    """Formats the speed-ups of bnres over the providers ``eager`` and ``compile``."""
    return [
        "-" if (ratio := subject.ratio("bnres", other)) is None else f"{ratio:.2f}×"
        for other in ("eager", "compile")
    ]


def operations(records: Sequence[Record]) -> list[str]:
    """Formats a table for each operation, direction, layout, dtype and batch size."""
    found = subjects(records, "ops")
    groups: dict[tuple[str, ...], list[Subject]] = {}
    for subject in found:
        record = subject.any
        layout, dtype, batch = setting(subject)
        key = (record["operation"], record["direction"], layout, dtype, f"batch {batch}")
        groups.setdefault(key, []).append(subject)
    sections = ["## Operations", LEGEND] if groups else []
    for (operation, direction, *rest), group in groups.items():
        providers = providers_in(group)
        smoke = ", small inputs" if group[0].any["smoke"] else ""
        title = (
            f"### {OPERATION_TITLES[operation]}, {DIRECTION_TITLES[direction]}: "
            f"{', '.join(rest)}{smoke}"
        )
        rows = [
            [
                subject.any["site"],
                *_cells(subject, providers, _timed),
                *speedups(subject),
                *_cells(subject, ["bnres"], _host),
            ]
            for subject in group
        ]
        headings = ["site", *providers, "vs. eager", "vs. compile", "host"]
        sections += [title, markdown_table(headings, rows)]
    return sections


def _timed(record: Record) -> str:
    share = f" ({record['share']:.0%})" if "share" in record else ""
    other = record.get("timed_dtype", record["dtype"])
    note = "" if other == record["dtype"] else f" {other}"
    return f"{record['median'] * 1e6:,.1f}{share}{note}"


def _host(record: Record) -> str:
    return f"{record['host_seconds'] * 1e6:,.0f}" if "host_seconds" in record else "-"


def nets(records: Sequence[Record]) -> list[str]:
    """Formats a table of training steps and a table of inference."""
    sections = []
    for suite, title, note in (
        ("step", "Training step", ""),
        ("infer", "Inference", " No provider folds batch norms into convolutions."),
    ):
        found = subjects(records, suite)
        if found:
            has_idle = any("idle" in r for s in found for r in s.records.values())
            sections += [
                f"## {title}",
                "The times are medians in milliseconds. The numbers in brackets are images/s."
                f"{note}{IDLE_NOTE if has_idle else ''}",
                _nets_table(found),
            ]
    return sections


def _nets_table(found: Sequence[Subject]) -> str:
    providers = providers_in(found)
    rows = [
        [net_title(subject), *_cells(subject, providers, _milliseconds), *speedups(subject)]
        for subject in found
    ]
    return markdown_table(["net", *providers, "vs. eager", "vs. compile"], rows)


def _cells(subject: Subject, providers: Sequence[str], cell: Callable[[Record], str]) -> list[str]:
    """Formats each provider's record with ``cell``. A provider without a record gets a dash."""
    return [cell(subject.records[p]) if p in subject.records else "-" for p in providers]


def net_title(subject: Subject) -> str:
    """Describes a net, its input, and whether a CUDA graph launches it."""
    record = subject.any
    launch = ", CUDA graph" if record["launch"] == "graph" else ""
    return (
        f"{record['net']}, {record['image']}×{record['image']}, batch {record['batch']}, "
        f"{record['dtype']}, {record['layout']}{launch}"
    )


def _milliseconds(record: Record) -> str:
    idle = f", idle {record['idle']:.0%}" if "idle" in record else ""
    return f"{record['median'] * 1e3:,.2f} ({record['images'] / record['median']:,.0f}){idle}"


def memory(records: Sequence[Record]) -> list[str]:
    """Formats a table of the memory of training steps."""
    found = subjects(records, "memory")
    if not found:
        return []
    providers = providers_in(found)
    rows = []
    for subject in found:
        for key, what in (("peak_bytes", "peak"), ("held_bytes", "held for backward")):
            cell = partial(_megabytes, key, subject.records.get("eager"))
            title = f"{net_title(subject)}: {what}"
            rows.append([title, *_cells(subject, providers, cell)])
    return [
        "## Memory of a training step",
        "The table shows by how many MB the allocated memory grows during a step. The number in "
        "brackets is the ratio to eager.",
        markdown_table(["net", *providers], rows),
    ]


def _megabytes(key: str, eager: Record | None, record: Record) -> str:
    ratio = f" ({record[key] / eager[key]:.2f}×)" if eager and eager[key] else ""
    return f"{record[key] / 1e6:,.0f}{ratio}"


def augmentation(records: Sequence[Record]) -> list[str]:
    """Formats a table of the images/s of augmentations."""
    found = subjects(records, "augment")
    if not found:
        return []
    providers = providers_in(found)
    rows = []
    for subject in found:
        record = subject.any
        title = (
            f"{record['name']}, {record['size']} to {record['out']}, batch {record['batch']}, "
            f"{record['dtype']}"
        )
        rows.append([title, *_cells(subject, providers, _images)])
    return [
        "## Augmentation",
        "The table shows the images/s of a chain of flip, resized crop, colour jitter and "
        "normalisation. The number in brackets is the share of the greatest possible speed, at "
        "which each image is read once and written once. The column bnres-kernel does not include "
        "drawing the random parameters.",
        markdown_table(["images", *providers], rows),
    ]


def _images(record: Record) -> str:
    return f"{record['images'] / record['median']:,.0f} ({record['share']:.0%})"


def notes(records: Sequence[Record]) -> list[str]:
    """Formats which backend or library each provider ran."""
    keys = [
        (record["provider"], record["timed_dtype"], record["note"])
        for record in records
        if record["status"] == "measured" and record.get("note")
    ]
    return _counted("What ran", ("provider", "dtype", "what ran"), keys)


def absent(records: Sequence[Record]) -> list[str]:
    """Formats which providers were not measured, and why."""
    keys = [
        (record["provider"], record["status"], record["reason"].partition("\n")[0])
        for record in records
        if record["status"] != "measured"
    ]
    return _counted("Not measured", ("provider", "status", "why"), keys)


def _counted(
    title: str, headings: Sequence[str], keys: Sequence[tuple[str, str, str]]
) -> list[str]:
    """Formats a table with a row for each distinct key and the number of its occurrences."""
    if not keys:
        return []
    lines = [f"| {' | '.join(headings)} | cases |", "|---|---|---|---:|"]
    for key, count in Counter(keys).items():
        cells = [text.replace("|", "\\|") for text in key]
        lines.append(f"| {' | '.join(cells)} | {count} |")
    return [f"## {title}", "\n".join(lines)]
