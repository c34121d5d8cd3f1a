"""Launches that go past triton's look-up: the same kernel with the same arguments, or another one.

The interpreter has nothing to look up, and without a GPU nothing runs: kernels are compiled for one
that is not there, in a process of its own, and their launches are recorded.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch

from tests.compiled import run_compiled


@contextmanager
def recorded_launches():
    """Launches of compiled kernels as (kernel, grid, arguments), and those that triton looked up."""
    import triton
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    from benchmarks.audit.standin import SM90, StandInDriver

    launches, looked_up = [], []

    def launcher(kernel):
        return lambda *arguments: launches.append((kernel, arguments[:3], arguments[9:]))

    look_up = JITFunction.run

    def run(self, *arguments, **named):
        looked_up.append(self.__name__)
        return look_up(self, *arguments, **named)

    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(StandInDriver(SM90))
    try:
        with (
            patch.object(CompiledKernel, "_init_handles", lambda self: None),
            patch.object(CompiledKernel, "run", property(launcher)),
            patch.object(JITFunction, "run", run),
        ):
            yield launches, looked_up
    finally:
        triton.runtime.driver._active = before


def same(a, b):
    return a is b or (isinstance(a, torch.Tensor) and torch.equal(a, b)) or a == b


def check_launches():
    from bnres.kernels import bn_forward
    from bnres.kernels.norm import Norm, Statistics

    def apply(x, weight, act="relu"):
        channels = torch.zeros(8)
        bn_forward.bn_apply(x, Norm(Statistics(channels, channels), weight), None, None, act, 0.0)

    x, weight = torch.zeros(4, 8, 6, 6), torch.zeros(8)
    with recorded_launches() as (launches, looked_up):
        apply(x, weight)
        apply(torch.ones_like(x), weight)
        assert len(looked_up) == 1
        (first, grid, arguments), (second, other_grid, other_arguments) = launches
        assert first is second and grid == other_grid and len(grid) == 3
        assert len(arguments) == len(other_arguments) == len(bn_forward._bn_apply_kernel.arg_names)
        named = dict(zip(bn_forward._bn_apply_kernel.arg_names, other_arguments, strict=True))
        assert named["x_ptr"].sum() == x.numel() and named["weight_ptr"] is weight
        assert named["C"] == 8 and named["HAS_WEIGHT"] and not named["HAS_BIAS"]
        # Everything that triton would compile another kernel for.
        others = [
            (x.to(torch.bfloat16), weight),
            (x, weight.to(torch.bfloat16)),
            (x, torch.zeros(9)[1:]),  # not aligned to 16 bytes
            (x, None),
            (x.contiguous(memory_format=torch.channels_last), weight),
            (torch.zeros(5, 8, 6, 6), weight),
            (x, weight, "silu"),
        ]
        for other in others:
            apply(*other)
        assert len(looked_up) == 1 + len(others)
        compiled = [kernel for kernel, *_ in launches]
        assert all(kernel is not first for kernel in compiled[2:5])
        for other in others:
            apply(*other)
        assert len(looked_up) == 1 + len(others)
        assert [kernel for kernel, *_ in launches[-len(others) :]] == compiled[2:]
    print("checked")


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def check_capture():
    from bnres.kernels import bn_forward
    from bnres.kernels.launch import launch
    from bnres.kernels.norm import Norm, Statistics

    def launch_on_gpu(kernel, grid, **arguments):
        moved = {
            name: value.as_subclass(OnGpu) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        launch(kernel, grid, **moved)

    def apply():
        x, channels = torch.zeros(4, 8, 6, 6), torch.zeros(8)
        norm = Norm(Statistics(channels, channels))
        bn_forward.bn_apply(x, norm, None, None, "relu", 0.0)

    capturing = patch.object(torch.cuda, "is_current_stream_capturing", return_value=True)
    idle = patch.object(torch.cuda, "is_current_stream_capturing", return_value=False)
    with recorded_launches() as (launches, _), patch.object(bn_forward, "launch", launch_on_gpu):
        with capturing:
            try:
                apply()
            except RuntimeError as error:
                assert "_bn_apply_kernel is launched with these arguments" in str(error)
                assert "run the same call once before the capture" in str(error)
            else:
                raise AssertionError("launched while capturing")
        assert launches == []
        with idle:
            apply()
        with capturing as asked:
            apply()
        assert len(launches) == 2 and not asked.called
    print("checked")


def test_a_known_launch_is_not_looked_up():
    result = run_compiled("-c", "from tests.test_launch import *; check_launches()")
    assert result.stdout == "checked\n", result.stderr


def test_the_first_launch_is_not_captured():
    result = run_compiled("-c", "from tests.test_launch import *; check_capture()")
    assert result.stdout == "checked\n", result.stderr
