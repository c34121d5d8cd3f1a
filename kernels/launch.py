"""Plans kernel launches from a tensor's shape and dtype, and launches kernels."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from bnres.kernels.channels import FINALIZE_CHANNELS, FINALIZE_SPLITS
from bnres.kernels.config import TUNING, column_config, launch_config, tile_for
from bnres.kernels.layout import pooled_size, view_of

# Two bfloat16 values may be loaded as one word if their address is a multiple of this many bytes.
WORD_BYTES = 4

# The size of each cache of plans.
PLANS = 4096

# These arguments of a plan are options of triton's compiler.
OPTIONS = ("num_warps", "num_stages")

# Triton's interpreter runs programs one after another, so few programs are enough. Its plans are
# made for this number of multiprocessors.
INTERPRETER_SM_COUNT = 1

# num_warps of the kernels that combine partial sums.
FINALIZE_WARPS = 8


@dataclass(frozen=True)
class Plan:
    """How a kernel is launched.

    Attributes:
        grid: number of programs along up to three axes.
        arguments: the kernel's arguments by name, except those that the caller passes to `launch`,
            and possibly the compiler options ``num_warps`` and ``num_stages``. `launch` ignores
            arguments that the kernel doesn't have.
    """

    grid: tuple[int, ...]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class TilePlan(Plan):
    """How a kernel is launched over the tiles of a tensor.

    Attributes:
        splits: number of programs among which the rows of a block of columns are divided.
        finalize: plan of the kernel that adds up the programs' partial sums, if they compute any.
    """

    finalize: Plan
    splits: int


@cache
def sm_count(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETER_SM_COUNT
    return torch.cuda.get_device_properties(device).multi_processor_count


def plan(kernel: str, x: Tensor) -> TilePlan:
    """Returns how ``kernel``, a key of `config.TUNING`, is launched over a dense ``x``."""
    return _plan(kernel, x.shape, x.is_contiguous(), x.dtype, sm_count(x.device))


@lru_cache(PLANS)
def _plan(
    kernel: str, shape: torch.Size, contiguous: bool, dtype: torch.dtype, sm_count: int
) -> TilePlan:
    view = view_of(shape, contiguous)
    tile = tile_for(view, dtype.itemsize)
    tile = replace(tile, words=tile.aligned and dtype == torch.bfloat16)
    config, tuning = launch_config(kernel, view, tile, sm_count), TUNING[kernel]
    sizes = {"count": view.count, "C": view.channels, "splits": config.splits, "rank_stride": 0}
    finalize = _finalize_plan(sizes)
    arguments = sizes | {
        "L": view.inner,
        "rows_per_split": config.rows_per_split,
        "TILE": tile,
        "UNROLL": tuning.unroll,
        "STAGES": tuning.num_stages,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }
    return TilePlan((config.col_blocks, config.splits), arguments, finalize, config.splits)


def plan_ranks(ranks: int, channels: int) -> Plan:
    """Returns the plan of the kernel that combines the moments of all ranks.

    A rank is a process. Its moments are count, mean and M2 = Σ(x − mean)² of each channel.
    """
    return _finalize_plan({"count": 0, "C": channels, "splits": ranks})


def _finalize_plan(sizes: dict[str, int]) -> Plan:
    trips = -(-sizes["splits"] // FINALIZE_SPLITS.value)
    return Plan(
        (-(-sizes["C"] // FINALIZE_CHANNELS.value),),
        sizes | {"TRIPS": trips, "num_warps": FINALIZE_WARPS},
    )


def plan_columns(kernel: str, x: Tensor, rows: int) -> Plan:
    """Returns how ``kernel``, a key of `config.TUNING`, is launched over pooling windows of ``x``.

    ``rows`` is the number of rows that are divided among the programs.
    """
    return _plan_columns(kernel, x.shape, x.is_contiguous(), x.itemsize, rows, sm_count(x.device))


@lru_cache(PLANS)
def _plan_columns(
    kernel: str, shape: torch.Size, contiguous: bool, itemsize: int, rows: int, sm_count: int
) -> Plan:
    config = column_config(kernel, shape, contiguous, itemsize, rows, sm_count)
    _, channels, height, width = shape
    out_height, out_width = pooled_size(height, width)
    arguments = {
        "C": channels,
        "H": height,
        "W": width,
        "OH": out_height,
        "OW": out_width,
        "columns": config.columns,
        "rows_per_program": config.rows_per_program,
        "TILE": config.tile,
        "STAGES": TUNING[kernel].num_stages,
    }
    return Plan((config.programs,), arguments)


class Launch(NamedTuple):
    """A recorded launch: the compiled kernel, its grid and all its arguments in order."""

    compiled: Any
    grid: tuple[int, ...]
    arguments: list[Any]


_recorder = threading.local()


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Yields a list, to which this thread's launches of compiled kernels are appended."""
    before = getattr(_recorder, "launches", None)
    launches: list[Launch] = []
    _recorder.launches = launches
    try:
        yield launches
    finally:
        _recorder.launches = before


def _starts_inside_word(argument: object) -> bool:
    """Whether ``argument`` is a bfloat16 tensor whose address is not a multiple of WORD_BYTES.

    A slice of a tensor may start at such an address.
    """
    return (
        isinstance(argument, Tensor)
        and argument.dtype == torch.bfloat16
        and argument.data_ptr() % WORD_BYTES != 0
    )


def launch(kernel: Any, plan: Plan, **named: Any) -> None:
    """Runs a kernel on the device of the kernel's first argument.

    Args:
        kernel: function decorated with `triton.jit`, whose first parameter is a tensor.
        plan: the grid and some of the kernel's arguments.
        named: the arguments that are not in ``plan``. A pointer that is missing from
            ``plan`` and ``named`` is passed as None, and a missing eps as 0.

    Raises:
        TypeError: if ``named`` has an argument that the kernel doesn't have, or if an argument that
            is neither a pointer nor an eps is missing.
    """
    names = kernel.arg_names
    absent = {n: None if n.endswith("_ptr") else 0.0 for n in names if n.endswith(("_ptr", "eps"))}
    arguments = absent | plan.arguments | named
    unknown = [name for name in named if name not in names]
    missing = [name for name in names if name not in arguments]
    if unknown or missing:
        raise TypeError(
            f"{kernel.fn.__name__}: unknown arguments: {', '.join(unknown) or 'none'}; missing "
            f"arguments: {', '.join(missing) or 'none'}"
        )
    ordered = {name: arguments[name] for name in names}
    tile = ordered.get("TILE")
    if tile is not None and tile.words and any(map(_starts_inside_word, ordered.values())):
        ordered["TILE"] = replace(tile, words=False)
    if not isinstance(kernel, JITFunction):
        kernel[plan.grid](**ordered)
        return
    options = {name: arguments[name] for name in OPTIONS if name in arguments}
    x = ordered[names[0]]
    # Triton launches kernels on the current device.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        compiled = kernel[plan.grid](**ordered, **options, enable_fp_fusion=True)
    launches = getattr(_recorder, "launches", None)
    if launches is not None:
        launches.append(Launch(compiled, (*plan.grid, 1, 1)[:3], list(ordered.values())))
