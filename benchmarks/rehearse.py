"""Checks, without a GPU, that `benchmarks.first_contact` will run on a machine with a GPU.

The checks run the real compiler, triton's launcher and the child processes of a campaign. They
can't find slow kernels or data races.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import cudnn_graphs, first_contact
from benchmarks.audit import specialisations
from benchmarks.environment import ROOT

# These tests run convolutions in fp32. ``-k`` leaves out tests of larger nets with them.
TF32_TESTS = (
    "tests/test_conv.py", "tests/test_fold.py", "tests/test_smoke.py",
    "-k", "not architectures and not derivatives and not batch_norms",
)  # fmt: skip
Outcome = tuple[bool | None, str]


def compiled() -> Outcome:
    """Checks that every kernel compiles, does not spill too many registers, and can be launched.

    Each combination of dtypes, constants and alignments that our operations use is checked. The
    launches call a stand-in for CUDA's driver.
    """
    found = specialisations.run(os.cpu_count() or 1)
    counts = f"{found.compiled} compiled, {found.launched} launched"
    return not found.failures, "\n".join([counts, *found.failures])


def campaigns() -> Outcome:
    """Checks that a campaign continues after a case that fails, hangs or ends its process."""
    return _tests("-m", "slow or not slow", "tests/test_campaign.py")


def rounded() -> Outcome:
    """Checks that tests pass if operands are rounded to TF32 wherever a GPU would round them."""
    return _tests("--emulate-tf32", *TF32_TESTS)


def _tests(*arguments: str) -> Outcome:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    lines = result.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return result.returncode == 0, "\n".join([*lines[-1:], *failed])


CHECKS: dict[str, Callable[[], Outcome]] = {
    "specialisations": compiled,
    "campaigns": campaigns,
    "tests in TF32": rounded,
    "cuDNN's graphs": cudnn_graphs.run,
}


def run(echo: Callable[[str], object]) -> int:
    """Runs two checks at a time, because some checks mostly wait. Returns how many failed."""
    failed = 0
    start = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        running = {name: pool.submit(check) for name, check in CHECKS.items()}
        for name, future in running.items():
            passed, text = future.result()
            failed += passed is False
            word = {True: "ok", False: "FAILED", None: "skipped"}[passed]
            echo(f"{name}: {word} after {time.monotonic() - start:.0f} s: {text}")
    minutes = sum(stage.minutes for stage in first_contact.stages(Path("FOLDER")))
    echo(
        "On a GPU, repeat `python -m benchmarks first-contact --out FOLDER` until it says that all "
        f"stages are done: at most {minutes:.0f} minutes in total, 9 minutes per call."
    )
    return failed
