"""Machine code of the kernels, compiled for a GPU that is not there, in a process of its own.

The interpreter and the compiler can't share a process. `python -m benchmarks audit`, which `.ci/run`
runs, compiles more of them, for more GPUs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.audit import budget

ROOT = Path(__file__).parent.parent


def test_every_kernel_family_is_within_its_budget():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.audit.machine_code", "--gpu", "sm_90", "--families"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert len({row["kernel"] for row in rows}) == 18
    assert [row["case"] for row in rows if row["missing"]] == []
    short = [row["case"] for row in rows if row["in_flight"] < row["wanted"]]
    assert short == []
    found = budget.Found([], {}, {}, budget.worst(rows))
    assert budget.exceeded(found, budget.load(), same_triton=False) == []
