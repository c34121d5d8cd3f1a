"""Tests and measures everything on a new GPU, in stages, over several calls.

``python -m benchmarks first-contact --out FOLDER`` runs each stage in its own process group, with a
time limit. It appends the output of a stage to ``log.txt`` and its outcome to ``stages.jsonl``.
If a stage fails, the next stage still runs. A later call with this folder runs the stages that are
left.
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

from benchmarks.environment import ROOT

STAGES, LOG = "stages.jsonl", "log.txt"
UNFINISHED, AGAIN = "unfinished", "again"
# A stage is started only if at least this many seconds remain of the call's time, and of the
# stage's own time limit.
LEAST_SECONDS = 10.0
# An interrupted stage gets this many seconds to print its results.
INTERRUPTED = 10.0
# A stage may take this many seconds longer than its argument ``--minutes`` says.
GRACE = 25.0
# The outcome of a stage includes at most this many bytes from the end of the stage's output.
TAIL = 4000
PYTEST = ("-m", "pytest", "-q", "-ra", "--tb=short", "-p", "no:cacheprovider")
# ncu, NVIDIA's profiler, measures these metrics of each kernel: its time, the bytes that it reads
# from memory and writes to memory, the share of the peak bandwidth, the share of busy issue slots,
# and the share of active warps.
COUNTERS = (
    "gpu__time_duration.sum,dram__bytes.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,"
    "sm__issue_active.avg.pct_of_peak_sustained_elapsed,"
    "sm__warps_active.avg.pct_of_peak_sustained_active"
)
# memcheck reports accesses to unallocated memory. torch places tensors next to each other in large
# allocations, where memcheck would miss an access beyond a tensor's end. With this variable each
# tensor is a separate allocation.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@dataclass(frozen=True)
class Stage:
    """A command with a time limit.

    Attributes:
        name: name of the stage.
        command: arguments of ``tool``, or of this Python interpreter if ``tool`` is None.
        minutes: time limit of the stage. If ``continues`` is true, all its runs together have this
            limit.
        tool: program to run. If it is not installed, the stage is skipped.
        continues: whether the command accepts ``--minutes`` and continues an earlier run.
        environment: environment variables to set.
    """

    name: str
    command: tuple[str, ...]
    minutes: float
    tool: str | None = None
    continues: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


def stages(folder: Path) -> list[Stage]:
    """Lists the stages, the most important ones first. Their results are stored in ``folder``."""
    out = str(folder)
    bench, command = ("-m", "benchmarks"), ("-m", "bnres.cli")
    smoke = (*PYTEST, "tests/test_smoke.py")
    sanitizer = ("--error-exitcode", "1", "--print-limit", "20", sys.executable, *smoke, "-n", "0")
    return [
        Stage("environment", (*bench, "run", "--out", out, "--minutes", "0"), 2),
        Stage("smoke", smoke, 2),
        Stage("tests", (*PYTEST, "-m", "not slow and not smoke"), 4),
        Stage("campaign", (*bench, "run", "--out", out), 8, continues=True),
        Stage("profile", (*bench, "profile"), 1),
        Stage("variants", (*bench, "variants", "--out", f"{out}/variants.jsonl"), 3,
              continues=True),
        Stage("tune", (*command, "tune", "--out", f"{out}/routes.json", "--minutes", "1.5"), 2),
        Stage("augmentation", (*bench, "run", "--only", "augment", "--out", out), 1,
              continues=True),
        Stage("mnist", (*command, "train", "--compare", "--dtype", "bf16"), 1.5),
        Stage("memcheck", ("--tool", "memcheck", *sanitizer), 2, "compute-sanitizer",
              environment=UNCACHED),
        Stage("racecheck", ("--tool", "racecheck", *sanitizer), 2, "compute-sanitizer"),
        Stage("counters", ("--clock-control", "none", "--metrics", COUNTERS, "--section",
                           "WarpStateStats", "--kernel-name", "regex:_bn_|_conv_", "--launch-count",
                           "60", "--kill", "yes", sys.executable, *bench, "once"), 2, "ncu"),
    ]  # fmt: skip


def run(
    folder: Path,
    minutes: float,
    echo: Callable[[str], object],
    again: Sequence[str] | None = None,
    chosen: Sequence[Stage] | None = None,
) -> int:
    """Runs stages until the time is up. Returns the number of stages that have not ended.

    A stage is started only if the remaining time is at least its time limit. The first stage of a
    call, and every stage that can be continued later, need only ``LEAST_SECONDS``.

    Args:
        folder: folder for the results.
        minutes: time limit of this call.
        echo: called with a line for each stage that was run or skipped.
        again: names of stages to run again although they have ended.
        chosen: stages to run. By default they are the result of `stages`.

    Raises:
        ValueError: if a name in ``again`` is not the name of a stage.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    chosen = stages(folder) if chosen is None else chosen
    for name in again or ():
        if name not in (names := [stage.name for stage in chosen]):
            raise ValueError(f"again must be one of {', '.join(names)}, got {name!r}")
        _append(folder / STAGES, {"stage": name, "status": AGAIN})
    is_first = True
    for stage in chosen:
        spent, ended = _record(folder, stage)
        if ended:
            continue
        left = min(deadline - time.monotonic(), 60 * stage.minutes - spent)
        if stage.tool and not shutil.which(stage.tool):
            result = {"status": "skipped", "reason": f"{stage.tool} is not installed"}
        elif left >= LEAST_SECONDS and (is_first or stage.continues or left >= 60 * stage.minutes):
            is_first = False
            result = _attempt(stage, folder, left)
        else:
            continue
        _append(folder / STAGES, {"stage": stage.name, **result})
        echo(f"{stage.name}: {result['status']}{_detail(result)}")
    return sum(not _record(folder, stage)[1] for stage in chosen)


def _attempt(stage: Stage, folder: Path, seconds: float) -> dict[str, Any]:
    """Runs a stage for at most ``seconds``, and returns its outcome.

    Its ``status`` is ``done``, ``failed``, ``timed out`` or ``unfinished``.
    """
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
            # A background job of a shell ignores SIGINT, and so would its child processes. `_wait`
            # interrupts a stage by SIGINT, so the default handler is restored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
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
    """Returns a process's exit code, or None if it took longer than ``seconds``.

    A process that takes longer is interrupted. If it does not exit within ``INTERRUPTED`` seconds,
    it is killed.
    """
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # An interrupted pytest prints its failures.
    with suppress(subprocess.TimeoutExpired):
        process.wait(INTERRUPTED)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return None


def _record(folder: Path, stage: Stage) -> tuple[float, bool]:
    """Returns for how many seconds a stage has run so far, and whether it has ended.

    A stage that can be continued also counts as ended if less than ``LEAST_SECONDS`` of its limit
    remain.
    """
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
