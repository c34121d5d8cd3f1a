"""Checks, without a GPU, that `benchmarks.first_contact` will run on a machine with one.

``python -m benchmarks rehearse`` runs the real compiler, triton's launcher, the child processes of
`benchmarks.campaign` and the report. It can't find slow kernels or data races.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import campaign, cudnn_graphs, first_contact, standins
from benchmarks.audit import specialisations
from benchmarks.cases import OpCase, telling_cases
from benchmarks.child import Child
from benchmarks.environment import ROOT
from benchmarks.report import performance_page, pictures, tables
from benchmarks.store import MADE_UP, load

# These tests run convolutions in fp32. Tests of larger nets with the same convolutions are left
# out.
TF32_TESTS = (
    "tests/test_conv.py", "tests/test_fold.py", "tests/test_smoke.py",
    "-k", "not architectures and not derivatives and not batch_norms",
)  # fmt: skip
# These are the time limits in seconds for one case with made-up timings, and for all these cases
# together.
CHILD_LIMIT, CAMPAIGN_LIMIT = 3.0, 600.0
Outcome = tuple[bool | None, str]


def compiled() -> Outcome:
    """Checks that every kernel compiles, does not spill too many registers, and can be launched.

    All specialisations of the kernels are checked. The launches call a stand-in for CUDA's driver.
    """
    found = specialisations.run(os.cpu_count() or 1)
    counts = f"{found.compiled} compiled, {found.launched} launched"
    return not found.failures, "\n".join([counts, *found.failures])


def survived() -> Outcome:
    """Checks that a campaign continues after cases that raise, hang, abort, exit or lack memory.

    The cases return made-up timings. The check also fails unless the report says that the timings
    are made up, and unless docs/performance.md can't be written from them.
    """
    telling = telling_cases()
    first = next(case for case in telling if isinstance(case, OpCase))
    deeds = [replace(first, batch=deed) for deed in standins.DEEDS if deed != standins.FINE]
    cases = [*deeds, *(replace(case, batch=standins.FINE) for case in telling)]
    device = torch.device("cpu")
    functions = campaign.Functions(
        *(f"{standins.__name__}:{name}" for name in ("describe", "measure_ceilings", "measure"))
    )
    with tempfile.TemporaryDirectory() as folder, Child() as child:
        store = campaign.open_store(Path(folder), device, child, functions)
        campaign.run(
            store, cases, time.monotonic() + CAMPAIGN_LIMIT, device, Console(quiet=True), child,
            functions, limit_of=lambda case: CHILD_LIMIT,
        )  # fmt: skip
        problems = [
            f"{case.id} is "
            f"{store.records[case.id]['status'] if case.id in store.records else 'lost'}"
            for case in cases
            if case.id not in store.records
            or store.records[case.id]["status"] != standins.OTHER_STATUS.get(case.batch, "failed")
        ]
        problems += _draw(Path(folder))
    return not problems, "\n".join([f"{len(cases)} cases", *problems])


def _draw(folder: Path) -> list[str]:
    """Writes the report of a folder of made-up timings. Returns what is wrong with the report."""
    about, records = load(folder)
    problems = []
    text = tables.report(about, records, pictures.draw(folder, about, records))
    if MADE_UP not in text:
        problems.append("the report does not say that its timings are made up")
    try:
        performance_page.measured(folder, about, records)
        problems.append("docs/performance.md accepts timings that are made up")
    except ValueError:
        pass
    return problems


def rounded() -> Outcome:
    """Checks that tests pass if operands are rounded to TF32 wherever a GPU would round them."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--emulate-tf32",
         *TF32_TESTS],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    lines = result.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return result.returncode == 0, "\n".join([*lines[-1:], *failed])


CHECKS: dict[str, Callable[[], Outcome]] = {
    "specialisations": compiled,
    "campaign and report": survived,
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
    minutes = sum(stage.minutes for stage in first_contact.stages(Path("FOLDER"), small=False))
    echo(
        "On a GPU, repeat `python -m benchmarks first-contact --out FOLDER` until it says that all "
        f"stages are done: at most {minutes:.0f} minutes in total, 9 minutes per call."
    )
    return failed
