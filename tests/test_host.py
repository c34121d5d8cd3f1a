"""Tests of ``python -m benchmarks host``: its table, limits and stand-in for convolutions."""

import re
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.audit import host
from benchmarks.audit.convolution import convolutions_compute_nothing
from tests.compiled import run_compiled

OPERATIONS = ("BN+ReLU", "BN+add+ReLU", "BN+BN+add+ReLU", "BN+ReLU+max-pool", "conv+BN+ReLU")
KINDS = ("inference", "forward", "backward")
LIMITED = {
    *((row, kind) for row in OPERATIONS for kind in KINDS),
    ("BN+add+ReLU, two gradients", "backward"),
    ("ResNet-18, fused layers", "step"),
    ("ResNet-18, bnres.fuse", "step"),
}
OTHERS = {
    *(("torch's BN, ReLU", kind) for kind in KINDS),
    ("ResNet-18, stock", "step"),
    ("ResNet-18, fuse - stock", "step"),
}
ROW = re.compile(
    r"^(.+?) +(inference|forward|backward|step) +(-?[\d.]+) +\((-?[\d.]+)\) +(-?[\d.]+) +(\S+)$",
    re.MULTILINE,
)
# Runs only two rounds, with limits that no ratio exceeds. A test may replace {} by a lower limit.
COMMAND = """
from benchmarks.audit import host
from benchmarks.cli import app
host.ROUNDS = 2
for limits in host.LIMITS.values():
    limits.update(dict.fromkeys(limits, 1e6))
{}
app(["host"])
"""


@pytest.mark.slow
def test_every_row_is_printed_with_its_ratio_and_limit():
    result = run_compiled("-c", COMMAND.format(""))
    assert result.returncode == 0, result.stderr
    rows = {(row, kind): rest for row, kind, *rest in ROW.findall(result.stdout)}
    assert {key for key, (*_, limit) in rows.items() if limit == "1000000.00"} == LIMITED
    assert {key for key, (*_, limit) in rows.items() if limit == "-"} == OTHERS
    for key, (least, median, *_) in rows.items():
        assert "fuse - stock" in key[0] or float(median) >= float(least) > 0, key
    fused, stock, difference = (
        float(rows[f"ResNet-18, {row}", "step"][2])
        for row in ("bnres.fuse", "stock", "fuse - stock")
    )
    assert difference == pytest.approx(fused - stock, abs=0.02)


def test_a_machine_that_changes_its_speed_does_not_change_a_ratio(monkeypatch):
    now, calls = 0, 0

    def timed(row, kind, cost):
        def call():
            nonlocal now, calls
            calls += 1
            now += 1000 * cost * (1 + calls // 100 % 2)  # slower in every second hundred calls

        return host.Timed(row, kind, nn.Identity(), call)

    monkeypatch.setattr(host.time, "thread_time_ns", lambda: now)
    forward, backward, call, step = host.measure(
        [
            timed(host.RULER, "forward", 10),
            timed(host.RULER, "backward", 20),
            timed("call", "forward", 25),
            timed("net", "step", 120),
        ]
    )
    assert {min(call.spans), max(call.spans)} == {25, 50}
    medians = [statistics.median(times.ratios) for times in (forward, backward, call, step)]
    assert medians == [1, 1, 2.5, 4]


@pytest.mark.slow
def test_a_ratio_over_its_limit_is_an_error():
    result = run_compiled("-c", COMMAND.format('host.LIMITS["BN+ReLU"]["forward"] = 0.01'))
    assert result.returncode == 1
    assert re.fullmatch(
        r"error: BN\+ReLU, forward: the ratio [\d.]+ exceeds its limit 0\.01\n", result.stderr
    )


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding", "dilation"), [(3, 1, 1, 1), (1, 2, 0, 1), (7, 2, 3, 2)]
)
def test_a_convolution_that_computes_nothing_returns_the_same_layouts(
    memory_format, bias, kernel_size, stride, padding, dilation
):
    def layouts():
        x = torch.randn(2, 4, 13, 12).contiguous(memory_format=memory_format).requires_grad_()
        weight = torch.randn(6, 4, kernel_size, kernel_size).contiguous(memory_format=memory_format)
        inputs = [x, weight.requires_grad_(), *([torch.randn(6).requires_grad_()] if bias else [])]
        y = F.conv2d(*inputs, stride=stride, padding=padding, dilation=dilation)
        tensors = [y, *torch.autograd.grad(y, inputs, torch.ones_like(y))]
        # Compares memory formats, not strides: strides of dimensions of size 1 are arbitrary.
        formats = [
            [
                t.is_contiguous(memory_format=f)
                for f in (torch.contiguous_format, torch.channels_last)
            ]
            for t in tensors
        ]
        return [(t.shape, t.dtype) for t in tensors], formats, y.detach()

    *expected, values = layouts()
    with convolutions_compute_nothing():
        *found, others = layouts()
    assert found == expected
    assert not torch.equal(values, others)
    assert torch.isfinite(layouts()[-1]).all()
