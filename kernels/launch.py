"""What launchers share: the plan for a tensor, the device, the accumulator's dtype, the launch."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from bnres.kernels.config import LaunchConfig, Tile, launch_config, tile_for
from bnres.kernels.layout import ChannelView, view_of

ACC_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}

# Greatest number of plans and of compiled specialisations that are cached.
PLANS, SPECIALIZATIONS = 4096, 4096

# Interpreted programs run one after another, so a few of them are enough.
INTERPRETER_SM_COUNT = 1


@dataclass(frozen=True)
class FinalizeConfig:
    """Tile of the kernels that combine partial sums (splits, C)."""

    block_splits: int
    block_channels: int
    num_warps: int

    def grid(self, channels: int) -> tuple[int]:
        return (-(-channels // self.block_channels),)


FINALIZE = FinalizeConfig(block_splits=256, block_channels=8, num_warps=8)


@cache
def sm_count(device: torch.device) -> int:
    """Number of multiprocessors of a device."""
    if device.type != "cuda":
        return INTERPRETER_SM_COUNT
    return torch.cuda.get_device_properties(device).multi_processor_count


def plan(kernel: str, x: Tensor) -> tuple[ChannelView, Tile, LaunchConfig]:
    """View, tile and launch configuration of ``kernel`` on a dense ``x``."""
    return _plan(kernel, x.shape, x.is_contiguous(), x.element_size(), sm_count(x.device))


@lru_cache(PLANS)
def _plan(
    kernel: str, shape: torch.Size, contiguous: bool, itemsize: int, sm_count: int
) -> tuple[ChannelView, Tile, LaunchConfig]:
    view = view_of(shape, contiguous)
    tile = tile_for(view, itemsize)
    return view, tile, launch_config(kernel, view, tile, sm_count)


def launch_scope(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of ``x`` current: a kernel is launched on the current device's stream."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Runs ``kernel[grid](**arguments)``, and takes far less host time from the second launch on.

    At each launch triton works out which specialisation of a kernel the arguments need. Here the
    compiled kernel is looked up by the arguments: the dtype and alignment of a tensor, the type of a
    float, the value of anything else. Triton's debugging knobs, and whether a global has changed,
    are checked at the first launch only.

    Args:
        kernel: a function decorated with `triton.jit`.
        grid: number of programs along up to three axes.
        arguments: all arguments of the kernel, the first one a tensor on the current device; and
            ``num_warps`` and ``num_stages``, unless triton chooses them.

    Raises:
        RuntimeError: if these arguments are launched for the first time while a CUDA graph is
            captured: the driver can't load a kernel then.
    """
    if not isinstance(kernel, JITFunction):
        kernel[grid](**arguments)
        return
    ordered = [arguments[name] for name in kernel.arg_names]
    key = [id(kernel), ordered[0].get_device()]
    key += arguments.get("num_warps"), arguments.get("num_stages")
    for value in ordered:
        kind = value.__class__
        if kind is bool or kind is int or value is None:
            key.append(value)
        elif kind is float:
            key.append(kind)
        elif kind is JITFunction:
            key.append(id(value))  # its hash would be computed from its source
        elif isinstance(value, Tensor):
            key += value.dtype, value.data_ptr() % 16 == 0
        else:
            key.append(value)
    specialization = tuple(key)
    compiled = _compiled.get(specialization)
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*ordered)
        return
    if ordered[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{kernel.__name__} is launched with these arguments for the first time while a CUDA "
            "graph is captured, and can't be loaded then: run the same call once before the capture"
        )
    if len(_compiled) >= SPECIALIZATIONS:
        _compiled.clear()
    _compiled[specialization] = kernel[grid](**arguments, enable_fp_fusion=True)
