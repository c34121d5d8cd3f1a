"""Compiles the specialisations of the kernels, without a GPU.

Triton compiles a kernel for each combination of its arguments' dtypes, constants and alignments. A
*specialisation* is one such combination. The calls in `benchmarks.audit.calls` determine the
specialisations. For sm_90 all of them are compiled. Then each is launched twice with a stand-in for
CUDA's driver: first by triton, and then by `bnres.kernels.replay`, which repeats the first launch.
For every other GPU, one specialisation of each kernel is compiled.
"""

import argparse
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks.audit.calls import Call, all_calls
from benchmarks.audit.sass import registers_and_stack
from benchmarks.audit.standin import GPUS, SM90, Gpu, Launch, compile_only, replaced_launches
from benchmarks.environment import ROOT
from bnres import kernels
from bnres.kernels.config import CHANNELS, GROUPS, PLANES, Tile
from bnres.kernels.device import ACTIVATIONS
from bnres.kernels.dtypes import SUPPORTED_DTYPES
from bnres.kernels.launch import Plan, launch
from bnres.kernels.replay import Replay

# At most this many characters of an error are reported.
LINE_LENGTH = 300
# STACK is the most bytes of a thread's stack, where spilled registers are stored, on NVIDIA's GPUs.
# It is not 0, because 64-bit offsets may need more registers. RAGGED_STACK is the limit for tiles
# whose rows do not all start at a multiple of the vector size. In such tiles each element needs its
# own address, which needs more registers.
STACK, RAGGED_STACK = 256, 512


@dataclass(frozen=True)
class Specialisation:
    """A kernel, the grid and arguments of one launch of it, and the call that made this launch."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    call: str

    def __str__(self) -> str:
        return f"{self.kernel.__name__} of {self.call}"

    def launch(self, *_: object) -> None:
        launch(self.kernel, Plan(self.grid, self.arguments))


def _key(kernel: JITFunction, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """Returns a key that is equal for launches of the same specialisation."""
    numbers = {p.name for p in kernel.params if not p.is_constexpr}

    def part(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        if name in numbers and type(value) is int:
            return value == 1 or (value % 16 == 0, value < 2**31)
        if name in numbers and type(value) is float:
            return float
        return value

    return kernel.__name__, *(part(name, value) for name, value in sorted(arguments.items()))


def collect(calls: Iterable[Call]) -> list[Specialisation]:
    """Returns the specialisations that the calls would launch. Nothing is compiled."""
    found: dict[tuple[Any, ...], Specialisation] = {}
    call: Call

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **arguments: Any) -> None:
        arguments.pop("enable_fp_fusion")
        new = Specialisation(self, tuple(grid), arguments, str(call))
        found.setdefault(_key(self, arguments), new)

    with replaced_launches(SM90, run):
        for call in calls:
            call()
    return list(found.values())


def all_kernels() -> list[JITFunction]:
    """Lists the kernels of `bnres.kernels`."""
    modules = [
        importlib.import_module(f"{kernels.__name__}.{module.name}")
        for module in pkgutil.iter_modules(kernels.__path__)
    ]
    found = {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    return list(found.values())


# For each (kernel, parameter): the values that no public call passes.
UNREACHED: dict[tuple[str, str], set[Any]] = {
    # The pooling kernels use PLANES for small planes too, unlike the other kernels.
    ("_bn_max_pool_kernel", "TILE"): {GROUPS},
    ("_bn_max_pool_bwd_dx_kernel", "TILE"): {GROUPS},
    # Pooling in fp64 uses torch's operation.
    ("_bn_max_pool_kernel", "x_ptr"): {torch.float64},
    ("_bn_max_pool_bwd_dx_kernel", "x_ptr"): {torch.float64},
    # Convolution in fp64 uses torch's operation.
    ("_conv_bn_act_kernel", "x_ptr"): {torch.float64},
}


def missing(found: Sequence[Specialisation]) -> list[str]:
    """Describes the values of kernels' parameters that occur in none of the specialisations.

    Each kernel should occur with both values of each flag, with every activation, kind of tile and
    dtype, and with and without each optional tensor. The values in ``UNREACHED`` are exceptions.
    """
    problems = []
    forward = {a.forward for a in ACTIVATIONS.values()}
    grad = {a.grad for a in ACTIVATIONS.values()}
    for kernel in all_kernels():
        launches = [s.arguments for s in found if s.kernel is kernel]
        if not launches:
            problems.append(f"{kernel.__name__} is not launched")
            continue
        for parameter in kernel.params:
            seen = {_plain(arguments[parameter.name]) for arguments in launches}
            kinds = {type(value) for value in seen}
            expected: set[Any] = set()
            if kinds == {bool}:
                expected = {True, False}
            elif kinds == {JITFunction}:
                expected = forward if seen & forward else grad
            elif Tile in kinds:
                expected = {CHANNELS, PLANES, GROUPS}
                seen = {tile.kind for tile in seen}
            elif parameter.name == "x_ptr":
                expected = set(SUPPORTED_DTYPES)
            elif None in seen and parameter.name.endswith("_ptr"):
                expected = {None, Tensor}
                seen = {None if value is None else Tensor for value in seen}
            lacking = expected - seen
            lacking -= UNREACHED.get((kernel.__name__, parameter.name), set())
            problems += [f"{kernel.__name__}: {parameter.name} is never {v}" for v in lacking]
    return sorted(problems)


def _plain(value: Any) -> Any:
    return value.dtype if isinstance(value, Tensor) else value


@dataclass
class Outcome:
    """The outcome of compiling and launching specialisations.

    Attributes:
        compiled: number of specialisations that were compiled and whose stack is within the limit.
        launched: number of specialisations whose two launches both reached the driver.
        failures: a line for each failure.
    """

    compiled: int = 0
    launched: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, other: "Outcome") -> None:
        self.compiled += other.compiled
        self.launched += other.launched
        self.failures += other.failures


def one_of_each_kernel(found: Sequence[Specialisation]) -> list[Specialisation]:
    """Returns the first specialisation of each kernel."""
    first: dict[str, Specialisation] = {}
    for specialisation in found:
        first.setdefault(specialisation.kernel.__name__, specialisation)
    return list(first.values())


def compile_all(gpu: Gpu, found: Sequence[Specialisation]) -> Outcome:
    """Compiles specialisations for a GPU.

    A specialisation fails if it does not compile or spills too much.
    """
    outcome = Outcome()

    def check(launched: Launch) -> None:
        if gpu.target.backend == "hip":
            return  # The audit's budget limits the spills on AMD.
        tile = launched.arguments.get("TILE")
        ragged = tile is not None and not tile.aligned
        _, stack = registers_and_stack(launched.compiled.asm["cubin"])
        if stack > (RAGGED_STACK if ragged else STACK):
            raise ValueError(
                f"a thread must have a stack of at most {RAGGED_STACK if ragged else STACK} bytes, "
                f"got {stack}"
            )

    with compile_only(gpu, check):
        for specialisation in found:
            try:
                specialisation.launch()
                outcome.compiled += 1
            except Exception as error:  # the compiler may raise anything
                outcome.failures.append(f"{gpu.name}: {specialisation}: {_in_one_line(error)}")
    return outcome


def launch_all(gpu: Gpu, found: Sequence[Specialisation]) -> Outcome:
    """Launches each specialisation twice, first by triton and then by `bnres.kernels.replay`.

    A specialisation fails if a launch raises an error or does not reach the driver.
    """
    from benchmarks.audit.launcher import LaunchingDriver, build_driver_library

    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder:
        library = build_driver_library(Path(folder))
        triton.runtime.driver.set_active(LaunchingDriver(gpu))
        for specialisation in found:
            before = library.count_launches()
            try:
                replay = Replay()
                tensors = {
                    id(v): v for v in specialisation.arguments.values() if isinstance(v, Tensor)
                }
                for _ in range(2):
                    replay.run(specialisation.launch, [list(tensors.values())])
                arrived = library.count_launches() - before
                if arrived != 2:
                    raise ValueError(f"2 launches must reach the driver, got {arrived}")
                outcome.launched += 1
            except Exception as error:  # the launcher may raise anything
                outcome.failures.append(f"launch: {specialisation}: {_in_one_line(error)}")
    return outcome


def _in_one_line(error: Exception) -> str:
    """Formats an error's type and the end of its message in one line.

    The start of a compiler's message is source code.
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())[-LINE_LENGTH:]}"


def run(processes: int) -> Outcome:
    """Compiles the specialisations in parallel.

    If there is no GPU, they are also launched, with a stand-in for CUDA's driver. Triton's cache
    contains the compiled kernels afterwards.

    Raises:
        RuntimeError: if a process fails.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.audit.specialisations", "--parts", str(processes)]
    workers = [
        subprocess.Popen(
            [*command, "--part", str(part)], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for part in range(processes)
    ]  # fmt: skip
    outcome = Outcome()
    for worker in workers:
        output, errors = worker.communicate()
        if worker.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{errors}")
        outcome.add(Outcome(**json.loads(output)))
    return outcome


def main() -> None:
    """Compiles one part of the specialisations and prints the outcome as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=int, required=True)
    parser.add_argument("--parts", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = collect(all_calls())
    outcome = Outcome(failures=missing(found) if options.part == 0 else [])
    part = found[options.part :: options.parts]
    outcome.add(compile_all(SM90, part))
    for gpu in GPUS.values():
        if gpu is not SM90:
            outcome.add(compile_all(gpu, one_of_each_kernel(found)[options.part :: options.parts]))
    if not torch.cuda.is_available():
        outcome.add(launch_all(SM90, part))
    print(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main()
