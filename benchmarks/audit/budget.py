"""Stores the results of an audit as a budget, and lists later results that are worse."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import triton

from bnres.files import write_text

PATH = Path(__file__).with_name("budget.json")
# The fields are those of `benchmarks.audit.memory.Row` or `benchmarks.audit.machine_code.Row`.
Row = dict[str, Any]
# The columns ``lanes``, ``sectors`` and ``in_flight`` may be worse than budgeted by this much.
SLACK = 1e-3
# The column ``share`` may exceed its budget by this fraction of the budget.
SHARE_SLACK = 0.02
# Greatest allowed number of subroutine calls inside loops. For all other kernels it is 0.
CALLS_ALLOWED = {"sm_100 _conv_bn_act_kernel channels_last bfloat16": 2}


@dataclass(frozen=True)
class Found:
    """The results of an audit.

    Attributes:
        memory: the rows that `benchmarks.audit.memory.audit` returns.
        traffic: bytes that a net moves, without its convolutions. A key with ``stock`` is for
            torch's own layers, and a key with ``fused`` is for ours. A key that ends with
            ``inference`` is for a forward in evaluation, otherwise for a training step.
        held: bytes that a training step saves for backward. The keys are ``stock`` (torch's own
            layers), ``fused`` (our layers) and ``recompute`` (our layers in `bnres.recompute`).
        launches: counts for a training step. ``fused, Triton`` is the number of kernels that bnres
            launches. ``stock, ATen`` and ``fused, ATen`` are numbers of ATen operations.
        kernels: the rows that `worst` returns.
    """

    memory: list[Row]
    traffic: dict[str, int]
    held: dict[str, int]
    launches: dict[str, int]
    kernels: list[Row]


def worst(rows: Iterable[Row]) -> list[Row]:
    """Returns a row for each GPU, kernel, layout and dtype, with the worst values of all launches.

    ``per_element`` belongs to the launch with the greatest ``share``, and ``at`` is its case.

    Args:
        rows: the rows of `benchmarks.audit.machine_code`, one for each launch.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(kernel_key(row), []).append(row)
    found = []
    for group in groups.values():
        names = {name: group[0][name] for name in ("gpu", "kernel", "layout", "dtype")}
        greatest = {
            name: max(r[name] for r in group) for name in ("registers", "spills", "missing")
        }
        calls = max((r["calls"] for r in group if r["calls"] is not None), default=None)
        in_flight = min((r["in_flight"] for r in group if r["in_flight"] is not None), default=None)
        slowest = max(group, key=lambda r: r["share"] or 0.0)
        found.append({
            **names, **greatest, "calls": calls, "in_flight": _rounded(in_flight),
            "per_element": _rounded(slowest["per_element"]), "share": _rounded(slowest["share"]),
            "at": slowest["case"] if slowest["share"] else "",
        })  # fmt: skip
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def load() -> tuple[Found, str]:
    """Returns the recorded budget, and the version of triton that it was recorded with.

    Raises:
        ValueError: if no budget is recorded.
    """
    if not PATH.exists():
        raise ValueError(f"{PATH} does not exist: run python -m benchmarks audit --record")
    content = json.loads(PATH.read_text(encoding="utf-8"))
    version = content.pop("triton")
    return Found(**content), version


def record(found: Found) -> None:
    """Stores the results of an audit as the budget."""
    content = {"triton": triton.__version__, **vars(found)}
    write_text(PATH, json.dumps(content, indent=1) + "\n")


def kernel_key(row: Row) -> str:
    return f"{row['gpu']} {row['kernel']} {row['layout']} {row['dtype']}"


def memory_key(row: Row) -> str:
    return f"{row['operation']} {row['step']} {row['layout']}"


def exceeded(found: Found, budget: Found, same_triton: bool) -> list[str]:
    """Describes each result that is worse than its budget.

    If the versions of triton differ, registers and shares are not compared, and spills are compared
    only if their budget is 0. The limit for calls inside loops is `CALLS_ALLOWED`.

    Args:
        found: the results.
        budget: the budget.
        same_triton: whether the results and the budget come from the same version of triton.
    """
    problems = []
    for title, counts, allowed in (
        ("bytes moved", found.traffic, budget.traffic),
        ("bytes held for backward", found.held, budget.held),
        ("launches in a step", found.launches, budget.launches),
    ):
        problems += [
            f"{title}, {kind}: {count}, budget {allowed[kind]}"
            for kind, count in counts.items()
            if count > allowed[kind]
        ]
    problems += _worse(found.memory, budget.memory, memory_key, _more_memory)
    compare = partial(_worse_code, same_triton=same_triton)
    problems += _worse(found.kernels, budget.kernels, kernel_key, compare)
    return problems


def _worse(
    rows: Iterable[Row], budget: Iterable[Row], key: Callable[[Row], str],
    compare: Callable[[Row, Row], list[str]],
) -> Iterator[str]:  # fmt: skip
    """Compares each row with the budget's row of the same key, and yields a text for each loss."""
    limits = {key(limit): limit for limit in budget}
    for row in rows:
        if key(row) in limits:
            yield from (f"{key(row)}: {what}" for what in compare(row, limits[key(row)]))
        else:
            yield f"{key(row)}: no budget is recorded"


def _more_memory(row: Row, limit: Row) -> list[str]:
    return [
        f"{row[count]:.4f} S in {count}, budget {limit[count]:.4f}"
        for count in ("lanes", "sectors")
        if row[count] > limit[count] + SLACK
    ]


def _worse_code(row: Row, limit: Row, same_triton: bool) -> list[str]:
    found = []
    if row["missing"] and not limit["missing"]:
        found.append(f"no {row['missing']}")
    if same_triton and row["registers"] > limit["registers"]:
        found.append(f"{row['registers']} registers, budget {limit['registers']}")
    if row["spills"] > limit["spills"] and (same_triton or not limit["spills"]):
        found.append(f"{row['spills']} spills, budget {limit['spills']}")
    allowed = CALLS_ALLOWED.get(kernel_key(row), 0)
    if (row["calls"] or 0) > allowed:
        found.append(f"{row['calls']} calls in loops, allowed are {allowed}")
    if (row["in_flight"] or 0) < (limit["in_flight"] or 0) - SLACK:
        found.append(
            f"{row['in_flight'] or 0:.0%} of the wanted bytes in flight, "
            f"budget {limit['in_flight']:.0%}"
        )
    shares = row["share"], limit["share"]
    if same_triton and None not in shares and shares[0] > shares[1] * (1 + SHARE_SLACK):
        found.append(
            f"issuing the instructions takes {row['share']:.3f} of the time to move the bytes, "
            f"budget {limit['share']:.3f}"
        )
    return found
