"""Replaces triton's GPU driver, so that a launch compiles its kernel but does not run it.

TRITON_INTERPRET must not be set, because the interpreter and the compiler can't share a process.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from bnres.kernels import launch


@dataclass(frozen=True)
class Gpu:
    """Properties of a GPU, from the vendors' manuals.

    Attributes:
        name: name of the architecture.
        device: index of the device. Triton caches a target by index, so every GPU has its own
            index.
        target: target for triton's compiler.
        sm_count: number of multiprocessors.
        registers: number of registers of a multiprocessor.
        shared_memory: bytes of shared memory of a multiprocessor.
        max_threads: greatest number of threads that a multiprocessor can run at once.
        max_programs: greatest number of programs that a multiprocessor can run at once.
    """

    name: str
    device: int
    target: GPUTarget
    sm_count: int
    registers: int
    shared_memory: int
    max_threads: int
    max_programs: int


SM80 = Gpu("sm_80", 0, GPUTarget("cuda", 80, 32), 108, 65536, 164 * 1024, 2048, 32)
SM90 = Gpu("sm_90", 1, GPUTarget("cuda", 90, 32), 132, 65536, 228 * 1024, 2048, 32)
SM100 = Gpu("sm_100", 2, GPUTarget("cuda", 100, 32), 148, 65536, 228 * 1024, 2048, 32)
GFX942 = Gpu("gfx942", 3, GPUTarget("hip", "gfx942", 64), 304, 131072, 64 * 1024, 2048, 32)
GPUS = {gpu.name: gpu for gpu in (SM90, SM80, SM100, GFX942)}


class StandInDriver:
    """Implements the driver's methods that ``triton.runtime.jit`` calls before it compiles."""

    # `bnres.kernels.replay` passes addresses to triton's own launcher, but tensors to others.
    launcher_cls = nvidia.CudaLauncher

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def get_current_target(self) -> GPUTarget:
        return self.gpu.target

    def get_current_device(self) -> int:
        return self.gpu.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(int(self.gpu.target.arch), 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@dataclass(frozen=True)
class Launch:
    """A launch whose kernel was compiled but not run."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    compiled: CompiledKernel


Run = Callable[..., Any]


@contextmanager
def replaced_launches(gpu: Gpu, run: Run) -> Iterator[None]:
    """Replaces triton's driver with a stand-in for ``gpu``, and ``JITFunction.run`` with ``run``.

    ``run`` must return None. Otherwise `bnres.kernels.replay` would record the launch, and would
    repeat it without calling ``run``.

    Raises:
        RuntimeError: if TRITON_INTERPRET is set.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("unset TRITON_INTERPRET: triton's interpreter does not compile kernels")
    original_run, original_count = JITFunction.run, launch.sm_count
    original_driver = triton.runtime.driver._active
    JITFunction.run = run
    launch.sm_count = lambda device: gpu.sm_count  # type: ignore[assignment]
    triton.runtime.driver.set_active(StandInDriver(gpu))
    try:
        yield
    finally:
        JITFunction.run, launch.sm_count = original_run, original_count
        triton.runtime.driver._active = original_driver


@contextmanager
def compile_only(gpu: Gpu, record: Callable[[Launch], None]) -> Iterator[None]:
    """Inside the context, a launch only compiles its kernel for ``gpu`` and calls ``record``.

    The launch's tensors are on the CPU.
    """
    original_run = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled = original_run(self, *args, grid=grid, warmup=True, **kwargs)
        record(Launch(self.__name__, tuple(grid), kwargs, compiled))

    with replaced_launches(gpu, run):
        yield
