"""Stores the audit's results as its budget, and lists what exceeds the budget."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from bnres.files import write_text

PATH = Path(__file__).with_name("budget.json")
Row = dict[str, Any]
# Two numbers may differ by this much, because decimals are rounded. The counts themselves are
# exact.
SLACK = 1e-3
# ``share``, the time to issue instructions, may exceed its budget by this fraction of the budget.
SHARE_SLACK = 0.02
# The kernels of a training step should not exceed these values. `unwanted` lists the kernels that
# exceed them.
WANTED_SHARE, WANTED_CALLS = 0.5, 0


@dataclass(frozen=True)
class Found:
    """The results of an audit.

    Attributes:
        memory: rows of `benchmarks.audit.memory`.
        traffic: bytes that a training step moves without its convolutions. The key ``stock`` is for
            torch's own layers, and the other keys are for ours.
        held: bytes that a training step holds for backward, with the same keys as ``traffic``.
        launches: number of launches of a training step. The keys name the net and what is launched.
        kernels: rows of `worst`.
    """

    memory: list[Row]
    traffic: dict[str, int]
    held: dict[str, int]
    launches: dict[str, int]
    kernels: list[Row]

    def as_json(self) -> dict[str, Any]:
        return {"triton": triton.__version__, **vars(self)}


def worst(rows: Iterable[Row]) -> list[Row]:
    """Returns a row with the worst values over all specialisations of a kernel.

    There is a row for each GPU, kernel, layout and dtype. In a row, ``in_flight`` is the number of
    bytes of loads in flight, divided by the number of bytes that must be in flight to hide the
    latency of memory. It is at most 1, and None if the loads in flight are not known.
    ``per_element``, ``bound`` and ``at`` describe the launch with the greatest ``share``. If no
    launch was counted, ``per_element`` and ``share`` are None, and ``bound`` and ``at`` are empty.
    """
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        flight = None
        if row["wanted"]:
            flight = round(min(row["in_flight"] / row["wanted"], 1.0), 4)
        fresh = {
            "gpu": row["gpu"],
            "kernel": row["kernel"],
            "layout": row["layout"],
            "dtype": row["dtype"],
            "specialisations": 1,
            "registers": row["registers"],
            "shared_memory": row["shared_memory"],
            "spills": row["spills"],
            "narrow": round(row["narrow"], 4),
            "in_flight": flight,
            "occupancy": round(row["occupancy"], 4),
            "matrix": row["matrix"],
            "missing": row["missing"],
            **_rounded(row["work"]),
            "at": "" if row["work"]["share"] is None else row["case"],
        }
        key = row["gpu"], row["kernel"], row["layout"], row["dtype"]
        if key not in found:
            found[key] = fresh
            continue
        kept = found[key]
        kept["specialisations"] += 1
        for name in ("registers", "shared_memory", "spills", "narrow", "missing"):
            kept[name] = max(kept[name], fresh[name])
        kept["occupancy"] = min(kept["occupancy"], fresh["occupancy"])
        read = [v for v in (kept["in_flight"], flight) if v is not None]
        kept["in_flight"] = min(read, default=None)
        if fresh["share"] is not None and (kept["share"] is None or fresh["share"] > kept["share"]):
            kept |= {name: fresh[name] for name in ("per_element", "share", "bound", "at")}
        calls = [v for v in (kept["calls"], fresh["calls"]) if v is not None]
        kept["calls"] = max(calls, default=None)
    return list(found.values())


def _rounded(work: Row) -> Row:
    return {n: round(v, 4) if isinstance(v, float) else v for n, v in work.items()}


def load() -> Found:
    """Returns the recorded budget.

    Raises:
        ValueError: if no budget is recorded.
    """
    if not PATH.exists():
        raise ValueError(f"{PATH} does not exist: run python -m benchmarks audit --record")
    content = json.loads(PATH.read_text(encoding="utf-8"))
    return Found(**{name: content[name] for name in Found.__dataclass_fields__})


def recorded_triton() -> str:
    """Returns the version of triton that the budget was recorded with."""
    return str(json.loads(PATH.read_text(encoding="utf-8"))["triton"])


def record(found: Found) -> None:
    """Stores the results of an audit as the budget."""
    text = json.dumps(found.as_json(), indent=1)
    write_text(PATH, text + "\n")


def kernel_key(row: Row) -> str:
    return f"{row['gpu']} {row['kernel']} {row['layout']} {row['dtype']}"


def memory_key(row: Row) -> str:
    return f"{row['operation']} {row['step']} {row['layout']}"


def exceeded(found: Found, budget: Found, same_triton: bool) -> list[str]:
    """Describes each result that is worse than its budget.

    Occupancy and the time to issue instructions depend on the compiler. They are compared only if
    the budget was recorded with the same version of triton. The numbers of spills and calls are
    also compared only in this case, unless their budget is 0. A budget of 0 is always compared.

    Args:
        found: the results.
        budget: the budget.
        same_triton: whether the results and the budget come from the same version of triton.
    """
    problems = []
    allowed = {memory_key(row): row for row in budget.memory}
    for row in found.memory:
        limit = allowed.get(memory_key(row))
        if limit is None:
            problems.append(f"{memory_key(row)}: no budget is recorded")
            continue
        problems += [
            f"{memory_key(row)}: {row[count]:.4f} S in {count}, budget {limit[count]:.4f}"
            for count in ("lanes", "sectors")
            if row[count] > limit[count] + SLACK
        ]
    problems += [
        f"{title}, {kind}: {size} bytes, budget {allowed_bytes[kind]}"
        for title, sizes, allowed_bytes in (
            ("moved in a step", found.traffic, budget.traffic),
            ("held for backward", found.held, budget.held),
        )
        for kind, size in sizes.items()
        if size > allowed_bytes[kind]
    ]
    problems += [
        f"launches in a step, {kind}: {count}, budget {budget.launches[kind]}"
        for kind, count in found.launches.items()
        if count > budget.launches[kind]
    ]
    limits = {kernel_key(row): row for row in budget.kernels}
    for row in found.kernels:
        limit = limits.get(kernel_key(row))
        if limit is None:
            problems.append(f"{kernel_key(row)}: no budget is recorded")
            continue
        problems += [f"{kernel_key(row)}: {what}" for what in _behind(row, limit, same_triton)]
    return problems


def unwanted(rows: Iterable[Row]) -> list[str]:
    """Describes each kernel of a step that exceeds `WANTED_SHARE` or `WANTED_CALLS`."""
    return [
        f"{kernel_key(row)}: share {row['share']:.2f}, {row['calls']} calls in loops"
        for row in rows
        if row["share"] is not None
        and row["kernel"].startswith("_bn_")
        and "finalize" not in row["kernel"]
        and (row["share"] > WANTED_SHARE or row["calls"] > WANTED_CALLS)
    ]


def _behind(row: Row, limit: Row, same_triton: bool) -> list[str]:
    found = []
    if row["missing"] and not limit["missing"]:
        found.append(f"no {row['missing']}")
    if row["spills"] > limit["spills"] and (same_triton or not limit["spills"]):
        found.append(f"{row['spills']} spills, budget {limit['spills']}")
    if row["narrow"] > limit["narrow"] + SLACK:
        found.append(f"share of narrow accesses {row['narrow']:.3f}, budget {limit['narrow']:.3f}")
    if limit["in_flight"] is not None and row["in_flight"] < limit["in_flight"] - SLACK:
        found.append(
            f"{row['in_flight']:.0%} of the wanted bytes in flight, budget {limit['in_flight']:.0%}"
        )
    if same_triton and row["occupancy"] < limit["occupancy"] - SLACK:
        found.append(f"occupancy {row['occupancy']:.0%}, budget {limit['occupancy']:.0%}")
    if row["share"] is None or limit["share"] is None:
        return found
    if same_triton and row["share"] > limit["share"] * (1 + SHARE_SLACK):
        found.append(
            f"instructions take {row['share']:.3f} of the byte time, budget {limit['share']:.3f}"
        )
    if row["calls"] > limit["calls"] and (same_triton or not limit["calls"]):
        found.append(f"{row['calls']} calls in loops, budget {limit['calls']}")
    return found
