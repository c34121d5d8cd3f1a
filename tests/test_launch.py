"""Tests that an operation's second call repeats the launches that its first call recorded.

The repeated launches must have the addresses of the second call's tensors.

Launches in triton's interpreter are not recorded, so these tests need compiled kernels. They
compile for a GPU in a new process, with a stand-in driver that runs nothing, and check the
arguments that triton's launcher receives.
"""

import weakref
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

from tests.compiled import run_compiled


@contextmanager
def launches_written_down():
    """Yields two lists: all launches, and the names of kernels launched by ``JITFunction.run``.

    A launch is (kernel, grid, arguments by name). Repeated launches don't call ``JITFunction.run``,
    so they are only in the first list.
    """
    import triton
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    from benchmarks.audit.standin import SM90, StandInDriver
    from bnres import use_backend

    launches, looked_up = [], []

    def launcher(kernel):
        def write_down(
            x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments
        ):
            named = dict(zip(kernel.src.fn.arg_names, arguments, strict=True))
            launches.append((kernel, (x, y, z), named))

        return write_down

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
            use_backend("triton"),
        ):
            yield launches, looked_up
    finally:
        triton.runtime.driver._active = before


def address(value):
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


class Call:
    """A batch norm's training step, with all tensors that the step reads and writes."""

    def __init__(self, shape=(4, 8, 6, 6), dtype=torch.float32, **options):
        from bnres.functional import batch_norm_act

        self.x, self.residual = (torch.zeros(shape, dtype=dtype).requires_grad_() for _ in "ab")
        self.weight, self.bias = (torch.zeros(shape[1]).requires_grad_() for _ in "ab")
        self.mean, self.var = torch.zeros(shape[1]), torch.ones(shape[1])
        self.counter = torch.tensor(0)
        self.run, self.options = batch_norm_act, options

    def forward(self):
        given = {"residual": self.residual, "training": True, "num_batches_tracked": self.counter}
        return self.run(
            self.x, self.mean, self.var, self.weight, self.bias, **(given | self.options)
        )

    def step(self):
        self.y = self.forward()
        inputs = (self.x, self.residual, self.weight, self.bias)
        self.dy = torch.ones_like(self.y)
        self.gradients = torch.autograd.grad(self.y, inputs, self.dy)


FORWARD = ["_bn_stats_kernel", "_bn_stats_finalize_kernel", "_bn_apply_kernel"]
BACKWARD = ["_bn_bwd_reduce_kernel", "_bn_bwd_finalize_kernel", "_bn_bwd_dx_kernel"]


def check_replays():
    first, second = Call(), Call()
    with launches_written_down() as (launches, looked_up):
        first.step()
        assert looked_up == FORWARD + BACKWARD
        recorded, launches[:] = list(launches), []
        second.step()
        assert looked_up == FORWARD + BACKWARD  # the second step adds none
    assert [kernel for kernel, *_ in launches] == [kernel for kernel, *_ in recorded]
    for (_, grid, arguments), (_, other_grid, others) in zip(launches, recorded, strict=True):
        assert grid == other_grid
        for name, value in others.items():
            if value is not None and not name.endswith("_ptr"):
                assert arguments[name] == value, name
    named = {kernel.src.fn.__name__: arguments for kernel, _, arguments in launches}
    stats, finalize, apply = (named[name] for name in FORWARD)
    reduce, sums, dx = (named[name] for name in BACKWARD)
    s = second
    for arguments, name, tensor in (
        (stats, "x_ptr", s.x), (finalize, "running_mean_ptr", s.mean),
        (finalize, "running_var_ptr", s.var), (finalize, "counter_ptr", s.counter),
        (apply, "x_ptr", s.x), (apply, "residual_ptr", s.residual), (apply, "y_ptr", s.y),
        (apply, "weight_ptr", s.weight), (apply, "bias_ptr", s.bias), (reduce, "x_ptr", s.x),
        (reduce, "dy_ptr", s.dy), (reduce, "dz_ptr", s.gradients[1]),
        (sums, "sum_dy_xhat_ptr", s.gradients[2]), (sums, "sum_dy_ptr", s.gradients[3]),
        (dx, "dy_ptr", s.gradients[1]), (dx, "dx_ptr", s.gradients[0]),
        (dx, "sum_dy_ptr", s.gradients[3]), (dx, "weight_ptr", s.weight),
    ):  # fmt: skip
        assert arguments[name] == tensor.data_ptr(), name
    # Backward reads the tensors that forward saved. Partial sums are stored in the memory of an
    # output that a later kernel writes: y in forward, dx in backward.
    for name in ("mean_ptr", "rstd_ptr"):
        assert finalize[name] == apply[name] == dx[name] != 0
    assert finalize["rstd_ptr"] > finalize["mean_ptr"] and apply["mask_ptr"] == reduce["mask_ptr"]
    assert stats["sums_ptr"] == finalize["sums_ptr"] == s.y.data_ptr()
    assert reduce["partial_ptr"] == sums["partial_ptr"] == s.gradients[0].data_ptr()
    print("checked")


def test_second_call_makes_the_same_launches_on_other_tensors():
    result = run_compiled("-c", "from tests.test_launch import *; check_replays()")
    assert result.stdout == "checked\n", result.stderr


def check_synchronised():
    """Checks the launches of rank 0 of 2. The fake process group sends nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from bnres.functional import sync_batch_norm_act

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    calls = [Call() for _ in range(3)]
    kernels = [*FORWARD[:2], *FORWARD[1:], *BACKWARD]
    with launches_written_down() as (launches, looked_up):
        for call in calls:
            call.run = lambda *given, training, **options: sync_batch_norm_act(*given, **options)
            launches[:] = []
            call.step()
            assert looked_up == kernels  # later calls add none
    stats, moments, combine, apply, reduce, sums, dx = (named for *_, named in launches)
    s, row = calls[-1], 8 * 4
    for arguments, name, expected in (
        (stats, "x_ptr", s.x.data_ptr()), (moments, "sums_ptr", stats["sums_ptr"]),
        (moments, "m2_ptr", moments["mean_ptr"] + row), (moments, "rstd_ptr", 0),
        (combine, "running_mean_ptr", s.mean.data_ptr()), (combine, "sums_ptr", 0),
        (combine, "counter_ptr", s.counter.data_ptr()), (combine, "rank_stride", 3 * 8),
        (combine, "mean_ptr", apply["mean_ptr"]), (combine, "rstd_ptr", dx["rstd_ptr"]),
        (apply, "y_ptr", s.y.data_ptr()), (apply, "mask_ptr", reduce["mask_ptr"]),
        (reduce, "dz_ptr", s.gradients[1].data_ptr()), (sums, "partial_ptr", reduce["partial_ptr"]),
        (sums, "sum_dy_ptr", s.gradients[3].data_ptr()), (dx, "dx_ptr", s.gradients[0].data_ptr()),
        (sums, "sum_dy_xhat_ptr", s.gradients[2].data_ptr()),
        (dx, "dy_ptr", s.gradients[1].data_ptr()), (dx, "stats_count", 1),
    ):  # fmt: skip
        assert (arguments[name] or 0) == expected, name
    assert combine["ranks_ptr"] != moments["mean_ptr"] - row
    assert 0 != dx["sum_dy_ptr"] != sums["sum_dy_ptr"]  # dx reads the sums over all ranks
    print("checked")


def test_launches_of_synchronised_calls():
    result = run_compiled("-c", "from tests.test_launch import *; check_synchronised()")
    assert result.stdout == "checked\n", result.stderr


def check_kinds():
    with launches_written_down() as (launches, looked_up):
        Call().step()
        # A call with one of these options may not repeat the first call's launches, because it
        # needs a different kernel or different numbers.
        others = [
            {"shape": (5, 8, 6, 6)}, {"dtype": torch.bfloat16}, {"act": "silu"}, {"residual": None},
            {"training": False}, {"eps": 0.5}, {"momentum": 0.5}, {"momentum": torch.tensor(0.5)},
            {"num_batches_tracked": None},
        ]  # fmt: skip
        for options in others:
            before = len(looked_up)
            Call(**options).forward()
            assert len(looked_up) > before, options
            before = len(looked_up)
            Call(**options).forward()
            assert len(looked_up) == before, options
        unaligned = Call()
        unaligned.weight = torch.zeros(9)[1:].requires_grad_()
        for _ in range(2):
            before = len(looked_up)
            unaligned.forward()
            assert len(looked_up) == before + 3
        # The first backward gets one tensor as two gradients. The second gets two tensors, and must
        # use both addresses.
        both = Call()
        y, fork = both.run(both.x, both.mean, both.var, training=True, fork=True)
        same = torch.ones_like(y)
        torch.autograd.grad((y, fork), both.x, (same, same), retain_graph=True)
        launches.clear()
        torch.autograd.grad((y, fork), both.x, (same, torch.ones_like(y)))
        _, _, reduce = launches[0]
        assert address(reduce["dy_ptr"]) != address(reduce["dy_skip_ptr"])
        # Without gradients, the statistics are not saved, so they are in temporary memory. The
        # memory of y can't be used, because the launch that writes y also reads the statistics.
        plain = Call()
        with torch.no_grad():
            for _ in range(2):
                launches.clear()
                y = plain.forward()
        assert address(launches[-1][2]["mean_ptr"]) not in (0, y.data_ptr())
        size = y.numel() * y.element_size()
        for name in ("mean_ptr", "rstd_ptr"):
            inside = address(launches[-1][2][name]) - y.data_ptr()
            assert not 0 <= inside < size
    print("checked")


@pytest.mark.slow
def test_calls_with_other_options_are_recorded_separately():
    result = run_compiled("-c", "from tests.test_launch import *; check_kinds()")
    assert result.stdout == "checked\n", result.stderr


def check_simulator():
    from benchmarks.audit.standin import StandInDriver

    with launches_written_down() as (launches, looked_up):
        # A simulator's launcher is of a class that triton does not define. `Call` is such a class.
        with patch.object(StandInDriver, "launcher_cls", Call):
            Call().step()
            count, launches[:] = len(looked_up), []
            call = Call()
            call.step()
        assert len(looked_up) == count
        tensors = [
            v for _, _, a in launches for n, v in a.items() if n.endswith("_ptr") and v is not None
        ]
        assert all(isinstance(t, torch.Tensor) for t in tensors)
        named = {kernel.src.fn.__name__: arguments for kernel, _, arguments in launches}
        assert named["_bn_apply_kernel"]["x_ptr"] is call.x
        sums = named["_bn_stats_kernel"]["sums_ptr"]
        assert sums.dtype == torch.float32 and sums.data_ptr() == call.y.data_ptr()
        mean, rstd = (named["_bn_bwd_dx_kernel"][name] for name in ("mean_ptr", "rstd_ptr"))
        assert mean.shape == rstd.shape == (8,) and mean.data_ptr() != rstd.data_ptr()
    print("checked")


def test_simulators_receive_tensors():
    result = run_compiled("-c", "from tests.test_launch import *; check_simulator()")
    assert result.stdout == "checked\n", result.stderr


def check_hooks_and_memory():
    import triton

    seen = []
    with launches_written_down() as (launches, _):
        Call().step()
        launches.clear()
        triton.knobs.runtime.launch_enter_hook.add(seen.append)
        call = Call()
        call.step()
        triton.knobs.runtime.launch_enter_hook.remove(seen.append)
        assert len(launches) == 6 and launches[0][2]["x_ptr"] == call.x.data_ptr()
        references = [weakref.ref(t) for t in (call.y, call.x, call.dy, *call.gradients)]
        del call
        assert [r() for r in references] == [None] * len(references)
    print("checked")


def test_replays_call_launch_hooks_and_keep_no_tensor():
    result = run_compiled("-c", "from tests.test_launch import *; check_hooks_and_memory()")
    assert result.stdout == "checked\n", result.stderr


def check_capture():
    from bnres.kernels.replay import Replay

    class OnGpu(torch.Tensor):
        """A CPU tensor whose ``is_cuda`` is true."""

        is_cuda = True

    x = torch.zeros(4).as_subclass(OnGpu)
    calls, replay = [], Replay()
    with patch.object(torch.cuda, "is_current_stream_capturing", return_value=True) as capturing:
        try:
            replay.run(calls.append, [(x,)])
        except RuntimeError as error:
            assert "make the same call once before the capture" in str(error)
        else:
            raise AssertionError("launched while capturing")
        assert calls == []
        capturing.return_value = False
        replay.run(calls.append, [(x,)])
        capturing.return_value = True
        replay.run(calls.append, [(x,)])  # allowed, because the kernels are loaded by now
        assert len(calls) == 2
    print("checked")


def test_first_call_is_refused_during_capture():
    result = run_compiled("-c", "from tests.test_launch import *; check_capture()")
    assert result.stdout == "checked\n", result.stderr
