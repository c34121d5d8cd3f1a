"""Tests that the audit reports missing specialisations, failed compilations and failed launches.

A specialisation is a combination of the dtypes, constants and alignments of a kernel's arguments.
Kernels are compiled in a new process, because triton's interpreter and compiler can't be used in
the same process.
"""

import json

import pytest

from tests.compiled import run_compiled
from tests.device import DEVICE

CODE = "from tests.test_specialisations import *; {}()"


def check_that_gaps_are_noticed():
    from benchmarks.audit import calls
    from benchmarks.audit.specialisations import collect, missing

    every = calls.all_calls()
    complete = missing(collect(every))
    lost = {}
    for function in sorted({call.name for call in every}):
        lost[function] = missing(collect(call for call in every if call.name != function))
    for axis, value in (
        ("input", "small planes"), ("dtype", "torch.float16"), ("act", "silu"),
        ("residual", "True"), ("training", "False"), ("has_contrast", "True"),
    ):  # fmt: skip
        kept = [call for call in every if str(call.options.get(axis)) != value]
        assert len(kept) < len(every)
        lost[f"{axis}={value}"] = missing(collect(kept))
    print(json.dumps({"complete": complete, "lost": lost}))


@pytest.mark.slow
def test_missing_calls_are_noticed():
    result = run_compiled("-c", CODE.format("check_that_gaps_are_noticed"))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["complete"] == []
    unnoticed = [what for what, problems in found["lost"].items() if not problems]
    assert unnoticed == []


def check_faults():
    import torch
    import triton
    import triton.language as tl

    from benchmarks.audit.specialisations import Specialisation, compile_all, launch_all
    from benchmarks.audit.standin import SM90

    @triton.jit
    def grows(x_ptr, N: tl.constexpr):
        # The shape of ``total`` changes in the loop. The compiler does not accept this.
        total = tl.zeros((1, N), tl.float32)
        for _ in tl.range(0, 4):
            total = tl.load(x_ptr + tl.arange(0, N)[:, None]) + total
        tl.store(x_ptr + tl.arange(0, N)[:, None] + tl.arange(0, N)[None, :], total)

    @triton.jit
    def fits(x_ptr, scale, N: tl.constexpr):
        offsets = tl.arange(0, N)
        tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) * scale)

    x = torch.zeros(256)

    sound = Specialisation(fits, (1,), {"x_ptr": x, "scale": 2.0, "N": 16}, "sound")
    broken = Specialisation(grows, (1,), {"x_ptr": x, "N": 16}, "broken")
    # Triton compiles this kernel, but its launcher rejects integers of more than 64 bits.
    misfit = Specialisation(fits, (1,), {"x_ptr": x, "scale": 2**70, "N": 16}, "misfit")
    compiled = compile_all(SM90, [sound, broken])
    launched = launch_all(SM90, [sound, misfit])
    print(json.dumps([compiled.compiled, compiled.failures, launched.launched, launched.failures]))


@pytest.mark.skipif(DEVICE == "cuda", reason="launches on a stand-in for CUDA's driver")
def test_a_kernel_that_does_not_compile_and_a_launch_that_fails_are_reported():
    result = run_compiled("-c", CODE.format("check_faults"))
    assert result.returncode == 0, result.stderr
    compiled, failures, launched, refused = json.loads(result.stdout)
    assert (compiled, launched) == (1, 1)
    assert len(failures) == 1 and "broken" in failures[0]
    assert len(refused) == 1 and "misfit" in refused[0]
