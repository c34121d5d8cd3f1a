"""Tests that a run ends if one of its processes dies, and resumes if torchrun restarts it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bnres.train.checkpoint import read_checkpoint

ROOT = Path(__file__).parent.parent
# The number of batches in an epoch: scikit-learn's digits have 1,437 training images, a batch has
# 256 images, and the smaller last batch is dropped.
BATCHES = 5


def environment(dies_at):
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "OMP_NUM_THREADS": "1",
        "DIES_AT": str(dies_at),
        # Otherwise a restarted process would read addresses from before the restart (pytorch issue
        # 135712).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


def train(out, norms, *restarts, dies_at):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         *restarts, "-m", "bnres.cli", "train", "--dataset", "digits", norms,
         "--model", "tests.own_models:Dies", "--epochs", "3", "--batch-size", "256",
         "--device", "cpu", "--checkpoint-steps", "2", "--out", str(out)],
        cwd=ROOT, env=environment(dies_at), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("norms", ["--no-fused", "--sync-bn"])
def test_a_run_of_which_a_process_is_killed(tmp_path, norms):
    whole = train(tmp_path / "whole", norms, dies_at=-1)
    assert whole.returncode == 0, whole.stderr
    # The process dies in the fourth batch of the second epoch. The last checkpoint before that is
    # written after the second batch of this epoch.
    start = time.monotonic()
    killed = train(tmp_path / "killed", norms, dies_at=BATCHES + 4)
    assert killed.returncode != 0 and time.monotonic() - start < 120
    restarted = train(tmp_path / "restarted", norms, "--max-restarts", "1", dies_at=BATCHES + 4)
    assert restarted.returncode == 0, restarted.stderr
    expected, found = (read_checkpoint(tmp_path / n / "last.pt") for n in ("whole", "restarted"))
    assert found["epoch"] == 3 and len(found["history"]) == 3
    for key, value in expected["model"].items():
        assert torch.equal(value, found["model"][key]), key
    stopped = read_checkpoint(tmp_path / "killed" / "last.pt")
    assert (stopped["epoch"], stopped["batch"]) == (1, 2)
    # One process resumes a run of two processes.
    resumed = subprocess.run(
        [sys.executable, "-m", "bnres.cli", "train", "--resume", str(tmp_path / "killed/last.pt")],
        cwd=ROOT, env=environment(-1), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert read_checkpoint(tmp_path / "killed" / "last.pt")["epoch"] == 3
