"""What every launcher needs: the plan for a tensor, its device, the type it computes in."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
import triton.language as tl
from torch import Tensor

from bnres.kernels.config import LaunchConfig, Tile, launch_config, tile_for
from bnres.kernels.layout import ChannelView, channel_view

ACC_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}

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
    view = channel_view(x)
    tile = tile_for(view, x.element_size())
    return view, tile, launch_config(kernel, view, tile, sm_count(x.device))


def launch_scope(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of ``x`` current, so that its current stream takes the launch."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()
