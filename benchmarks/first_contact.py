"""Everything that the first minutes on a GPU are to show, in stages that can be continued.

``python -m benchmarks first-contact --out FOLDER`` runs each stage in a process group with a time
limit. What a stage printed is in ``log.txt``, what became of it in ``stages.jsonl``; a stage that
failed does not stop the next. Called again it continues with the stages, and within the stages, that
are not finished. Without a GPU everything runs in small.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT

STAGES, LOG = "stages.jsonl", "log.txt"
# No stage is started with less time left.
LEAST_SECONDS = 10.0
TAIL = 4000
UNFINISHED = "unfinished"
PYTEST = ("-m", "pytest", "-q", "-ra", "--tb=short", "-p", "no:cacheprovider")
# Of a kernel at work: share of the memory's bandwidth, share of issue slots in use, stalls by reason.
COUNTERS = (
    "gpu__time_duration.sum,dram__bytes.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,"
    "sm__issue_active.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active"
)


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: of the stage.
        command: arguments of this Python, or of ``tool``.
        minutes: the most it may take, over all calls.
        tool: a program that has to be installed.
        needs_gpu: whether it says nothing without a GPU.
        continues: whether it takes ``--minutes``, goes on where it stopped, and so can be run in
            several calls.
    """

    name: str
    command: tuple[str, ...]
    minutes: float
    tool: str | None = None
    needs_gpu: bool = False
    continues: bool = False


def stages(folder: Path, small: bool) -> list[Stage]:
    """All stages, the most telling ones first."""
    out = str(folder)
    bench = ("-m", "benchmarks")
    train: tuple[str, ...] = (
        "-m",
        "bnres.cli",
        "train",
        "--compare",
        "--dtype",
        "bf16",
        "--channels-last",
    )
    profile: tuple[str, ...] = (*bench, "profile")
    variants = Stage(
        "variants", (*bench, "variants", "--out", f"{out}/variants.jsonl"), 3, continues=True
    )
    tests: tuple[str, ...] = PYTEST
    campaign_minutes = 8.0
    if small:
        train += ("--epochs", "1", "--batch-size", "500", "--model", "lenet-seed")
        profile += ("--batch", "4", "--image", "32")
        interpreted = ("TRITON_INTERPRET=1", sys.executable, *variants.command)
        variants = replace(variants, command=interpreted, tool="env", minutes=0.3)
        tests, campaign_minutes = (*PYTEST, "tests/test_kernels.py"), 1.0
    smoke = (*PYTEST, "-m", "smoke")
    sanitizer = ("--error-exitcode", "1", "--print-limit", "20", sys.executable, *smoke, "-n", "0")
    return [
        Stage("environment", (*bench, "run", "--out", out, "--minutes", "0"), 2),
        Stage("smoke", smoke, 2),
        Stage("tests", tests, 4),
        Stage("campaign", (*bench, "run", "--out", out), campaign_minutes, continues=True),
        Stage("profile", profile, 1),
        variants,
        Stage("tune", ("-m", "bnres.cli", "tune", "--out", f"{out}/routes.json"), 2,
              needs_gpu=True, continues=True),
        Stage("augmentation", (*bench, "run", "--suite", "augment", "--out", out), 1, continues=True),
        Stage("mnist", train, 2),
        Stage("memcheck", ("--tool", "memcheck", *sanitizer), 3, "compute-sanitizer", True),
        Stage("racecheck", ("--tool", "racecheck", *sanitizer), 3, "compute-sanitizer", True),
        Stage("counters", ("--clock-control", "none", "--metrics", COUNTERS, "--section",
                           "WarpStateStats", "--kernel-name", "regex:_bn_|_conv_", sys.executable,
                           *bench, "once"), 2, "ncu", True),
    ]  # fmt: skip


def run(
    folder: Path,
    minutes: float,
    echo: Callable[[str], object],
    chosen: Sequence[Stage] | None = None,
) -> int:
    """Runs stages until the time is up; returns how many are not finished."""
    small = not torch.cuda.is_available()
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    chosen = stages(folder, small) if chosen is None else chosen
    for stage in chosen:
        spent, finished = _record(folder, stage)
        if finished:
            continue
        left = min(deadline - time.monotonic(), 60 * stage.minutes - spent)
        reason = _unavailable(stage, small)
        if reason is None and left < LEAST_SECONDS:
            break
        result = (
            {"status": "skipped", "reason": reason} if reason else _attempt(stage, folder, left)
        )
        _append(folder / STAGES, {"stage": stage.name, **result})
        echo(f"{stage.name}: {result['status']}{_detail(result)}")
    return sum(not _record(folder, stage)[1] for stage in chosen)


def _unavailable(stage: Stage, small: bool) -> str | None:
    if stage.needs_gpu and small:
        return "needs a GPU"
    if stage.tool and not shutil.which(stage.tool):
        return f"{stage.tool} is not installed"
    return None


def _attempt(stage: Stage, folder: Path, seconds: float) -> dict[str, Any]:
    """Runs a stage for at most so long; ``status`` is done, failed, timed out or unfinished."""
    command = [stage.tool or sys.executable, *stage.command]
    if stage.continues:
        command += ["--minutes", f"{seconds / 60:.2f}"]
    log = folder / LOG
    with log.open("ab") as file:
        file.write(f"\n===== {stage.name}: {' '.join(command)}\n".encode())
        file.flush()
        begin, start = file.tell(), time.monotonic()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            # One that takes --minutes ends by itself, a little later.
            code = process.wait(seconds + (60 if stage.continues else 0))
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, KeyboardInterrupt):
                raise
            code = None
    taken = time.monotonic() - start
    status = "timed out" if code is None else "failed" if code else "done"
    if stage.continues and code == 0 and taken >= seconds:
        status = UNFINISHED
    with log.open("rb") as file:
        file.seek(begin)
        tail = file.read()[-TAIL:].decode(errors="replace")
    return {"status": status, "code": code, "seconds": round(taken, 1), "tail": tail}


def _record(folder: Path, stage: Stage) -> tuple[float, bool]:
    """Seconds that a stage has taken so far, and whether it is finished, or has used up its time."""
    path = folder / STAGES
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [record for line in lines if (record := json.loads(line))["stage"] == stage.name]
    spent = sum(record.get("seconds", 0.0) for record in records)
    ended = bool(records) and records[-1]["status"] != UNFINISHED
    return spent, ended or spent > 60 * stage.minutes - LEAST_SECONDS


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _detail(result: dict[str, Any]) -> str:
    if "reason" in result:
        return f" ({result['reason']})"
    last = [line for line in result["tail"].splitlines() if line.strip()][-1:]
    return f" in {result['seconds']:.0f} s: {''.join(last).strip()[:160]}"
