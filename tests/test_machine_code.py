"""Machine code of the kernels, compiled for a GPU that is not there, in a process of its own.

The interpreter and the compiler can't share a process. `python -m benchmarks audit`, which `.ci/run`
runs, compiles more of them, for more GPUs.
"""

import json

from benchmarks.audit import budget
from tests.compiled import run_compiled


def test_every_kernel_family_is_within_its_budget():
    result = run_compiled("-m", "benchmarks.audit.machine_code", "--gpu", "sm_90", "--families")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert len({row["kernel"] for row in rows}) == 15
    assert [row["case"] for row in rows if row["missing"]] == []
    short = [row["case"] for row in rows if row["in_flight"] < row["wanted"]]
    assert short == []
    found = budget.Found([], {}, {}, budget.worst(rows))
    assert budget.exceeded(found, budget.load(), same_triton=False) == []
