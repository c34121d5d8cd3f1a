"""Everything that the first minutes on a GPU are to show, in stages.

``python -m benchmarks first-contact --out FOLDER`` runs each stage in a process group with a time
limit. What a stage printed is in ``log.txt``, how it ended in ``stages.jsonl``; a stage that failed does
not stop the next. Called again, it goes on with the stages that have not ended. Without a GPU everything
runs in small.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT

STAGES, LOG = "stages.jsonl", "log.txt"
UNFINISHED, AGAIN = "unfinished", "again"
# A stage that continues is not started with less time left.
LEAST_SECONDS = 10.0
# Seconds for a stage to print its results after an interrupt; and, if it takes ``--minutes``, to end.
INTERRUPTED, GRACE = 10.0, 25.0
TAIL = 4000
PYTEST = ("-m", "pytest", "-q", "-ra", "--tb=short", "-p", "no:cacheprovider")
# Of a kernel at work: share of the memory's bandwidth, share of issue slots in use, stalls by reason.
COUNTERS = (
    "gpu__time_duration.sum,dram__bytes.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,"
    "sm__issue_active.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active"
)
# torch's allocator puts small tensors into large blocks, where an overrun is not noticed.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: of the stage.
        command: arguments of this Python, or of ``tool``.
        minutes: the most it may take; of one that continues, in all calls together.
        tool: a program that has to be installed.
        needs_gpu: whether it says nothing without a GPU.
        continues: whether it takes ``--minutes`` and goes on where it stopped.
        environment: variables that are set for it.
    """

    name: str
    command: tuple[str, ...]
    minutes: float
    tool: str | None = None
    needs_gpu: bool = False
    continues: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


def stages(folder: Path, small: bool) -> list[Stage]:
    """All stages, the most telling ones first."""
    out = str(folder)
    bench = ("-m", "benchmarks")
    smoke = (*PYTEST, "tests/test_smoke.py")
    tests: tuple[str, ...] = (*PYTEST, "-m", "not slow and not smoke")
    profile: tuple[str, ...] = (*bench, "profile")
    train: tuple[str, ...] = ("-m", "bnres.cli", "train", "--compare", "--dtype", "bf16")
    train += ("--channels-last",)
    campaign_minutes, variants_minutes, interpreter = 8.0, 3.0, {}
    if small:
        tests = (*PYTEST, "tests/test_kernels.py")
        profile += ("--batch", "4", "--image", "32")
        train += ("--epochs", "1", "--batch-size", "500", "--model", "lenet-seed")
        campaign_minutes, variants_minutes = 1.0, 0.3
        interpreter = {"TRITON_INTERPRET": "1"}
    sanitizer = ("--error-exitcode", "1", "--print-limit", "20", sys.executable, *smoke, "-n", "0")
    return [
        Stage("environment", (*bench, "run", "--out", out, "--minutes", "0"), 2),
        Stage("smoke", smoke, 2),
        Stage("tests", tests, 4),
        Stage("campaign", (*bench, "run", "--out", out), campaign_minutes, continues=True),
        Stage("profile", profile, 1),
        Stage("variants", (*bench, "variants", "--out", f"{out}/variants.jsonl"), variants_minutes,
              continues=True, environment=interpreter),
        Stage("tune", ("-m", "bnres.cli", "tune", "--out", f"{out}/routes.json", "--minutes", "1.5"),
              2, needs_gpu=True),
        Stage("augmentation", (*bench, "run", "--suite", "augment", "--out", out), 1, continues=True),
        Stage("mnist", train, 1.5),
        Stage("memcheck", ("--tool", "memcheck", *sanitizer), 2, "compute-sanitizer", True,
              environment=UNCACHED),
        Stage("racecheck", ("--tool", "racecheck", *sanitizer), 2, "compute-sanitizer", True),
        Stage("counters", ("--clock-control", "none", "--metrics", COUNTERS, "--section",
                           "WarpStateStats", "--kernel-name", "regex:_bn_|_conv_", "--launch-count",
                           "60", "--kill", "yes", sys.executable, *bench, "once"), 2, "ncu", True),
    ]  # fmt: skip


def run(
    folder: Path,
    minutes: float,
    echo: Callable[[str], object],
    again: Sequence[str] = (),
    chosen: Sequence[Stage] | None = None,
) -> int:
    """Runs stages until the time is up; returns how many have not ended.

    A stage is started if its limit fits into the rest of this call, or if it is the first stage of the
    call; a stage that continues needs only ``LEAST_SECONDS``.

    Args:
        folder: of the results.
        minutes: of this call.
        echo: takes a line for each stage that was run.
        again: stages that are run again though they have ended.
        chosen: the stages; `stages` if None.

    Raises:
        ValueError: for a stage that does not exist.
    """
    small = not torch.cuda.is_available()
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    chosen = stages(folder, small) if chosen is None else chosen
    for name in again:
        if name not in (names := [stage.name for stage in chosen]):
            raise ValueError(f"again must be of {', '.join(names)}, got {name!r}")
        _append(folder / STAGES, {"stage": name, "status": AGAIN})
    is_first = True
    for stage in chosen:
        spent, ended = _record(folder, stage)
        if ended:
            continue
        left = min(deadline - time.monotonic(), 60 * stage.minutes - spent)
        reason = _unavailable(stage, small)
        if reason is None:
            if left < LEAST_SECONDS or not (
                is_first or stage.continues or left >= 60 * stage.minutes
            ):
                continue
            is_first = False
            result = _attempt(stage, folder, left)
        else:
            result = {"status": "skipped", "reason": reason}
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
    """Runs a stage for at most ``seconds``; ``status`` is done, failed, timed out or unfinished."""
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
            process_group=0, env={**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment},
        )  # fmt: skip
        try:
            code = _wait(process, seconds + (GRACE if stage.continues else 0))
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    taken = time.monotonic() - start
    status = "timed out" if code is None else "failed" if code else "done"
    if stage.continues and code == 0 and taken > 0.9 * seconds:
        status = UNFINISHED
    with log.open("rb") as file:
        file.seek(begin)
        tail = file.read()[-TAIL:].decode(errors="replace")
    return {"status": status, "code": code, "seconds": round(taken, 1), "tail": tail}


def _wait(process: "subprocess.Popen[bytes]", seconds: float) -> int | None:
    """The exit code of a process, or None if it had to be interrupted, and killed if need be."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # pytest then prints its failures
    with suppress(subprocess.TimeoutExpired):
        process.wait(INTERRUPTED)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return None


def _record(folder: Path, stage: Stage) -> tuple[float, bool]:
    """Seconds that a stage has taken so far, and whether it has ended, or has used up its time."""
    path = folder / STAGES
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    spent, ended = 0.0, False
    for record in map(json.loads, lines):
        if record["stage"] == stage.name:
            spent = 0.0 if record["status"] == AGAIN else spent + record.get("seconds", 0.0)
            ended = record["status"] not in (UNFINISHED, AGAIN)
    return spent, ended or (stage.continues and spent > 60 * stage.minutes - LEAST_SECONDS)


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _detail(result: dict[str, Any]) -> str:
    if "reason" in result:
        return f" ({result['reason']})"
    last = [line for line in result["tail"].splitlines() if line.strip()][-1:]
    return f" in {result['seconds']:.0f} s: {''.join(last).strip()[:160]}"
