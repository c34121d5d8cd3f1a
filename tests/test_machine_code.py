"""Machine code of the kernels, compiled for GPUs that are not there, in a process of its own.

The interpreter and the compiler can't share a process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def audit(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.audit.machine_code", "--json", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.stdout, result.stderr
    return json.loads(result.stdout)


def check(rows):
    for row in rows:
        print(row["gpu"], row["kernel"], row["case"], row["registers"], row["in_flight"])
    assert [(row["case"], row["kernel"], row["failures"]) for row in rows if row["failures"]] == []


@pytest.mark.slow
def test_every_specialisation_on_sm90():
    """A ResNet-18 step, and the convolutions of ResNet-18 and ResNet-50."""
    rows = audit()
    check(rows)
    convs = [row for row in rows if row["kernel"] == "_conv_bn_act_kernel"]
    assert len(convs) >= 20
    assert len({row["kernel"] for row in rows}) == 13
    assert {row["case"].split()[0] for row in rows if row not in convs} == {
        "stem", "layer1", "layer2", "layer3", "layer4"
    }  # fmt: skip


@pytest.mark.parametrize(
    "gpu",
    [
        "sm_90",
        *(pytest.param(gpu, marks=pytest.mark.slow) for gpu in ("sm_80", "sm_100", "gfx942")),
    ],
)
def test_every_kernel_family(gpu):
    rows = audit("--families", "--gpu", gpu)
    check(rows)
    assert len({row["kernel"] for row in rows}) == (10 if gpu == "gfx942" else 13)
