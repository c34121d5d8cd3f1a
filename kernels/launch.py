"""What every launcher needs: the plan for a tensor, its device, the type it computes in, the launch."""

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

# Shapes whose plans are kept, and specialisations that are found again without triton.
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
    """Multiprocessors to fill."""
    if device.type != "cuda":
        return INTERPRETER_SM_COUNT
    return torch.cuda.get_device_properties(device).multi_processor_count


def plan(kernel: str, x: Tensor) -> tuple[ChannelView, Tile, LaunchConfig]:
    """View, tile and launch configuration of ``kernel`` over a dense ``x``."""
    return _plan(kernel, x.shape, x.is_contiguous(), x.element_size(), sm_count(x.device))


@lru_cache(PLANS)
def _plan(
    kernel: str, shape: torch.Size, contiguous: bool, itemsize: int, sm_count: int
) -> tuple[ChannelView, Tile, LaunchConfig]:
    view = view_of(shape, contiguous)
    tile = tile_for(view, itemsize)
    return view, tile, launch_config(kernel, view, tile, sm_count)


def launch_scope(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of ``x`` current, so that its current stream takes the launch."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Runs ``kernel[grid](**arguments)``, at a fraction of the host's time where it has run before.

    Triton works out at each launch what a kernel is to be specialised on. Here a compiled kernel is
    found by the arguments themselves: of tensors type and alignment, of floats nothing, of the
    others the value. What else triton looks at, its debugging knobs and whether a global has
    changed, counts at the first launch alone.

    Args:
        kernel: one of `triton.jit`.
        grid: programs, up to three axes.
        arguments: all of the kernel's, the first one a tensor on the current device; and
            ``num_warps`` and ``num_stages`` if triton is not to choose them.
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
            key.append(id(value))  # its hash is one of its source
        elif isinstance(value, Tensor):
            key += value.dtype, value.data_ptr() % 16 == 0
        else:
            key.append(value)
    specialization = tuple(key)
    compiled = _compiled.get(specialization)
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*ordered)
        return
    if len(_compiled) >= SPECIALIZATIONS:
        _compiled.clear()
    _compiled[specialization] = kernel[grid](**arguments, enable_fp_fusion=True)
