"""Fills up the channels of a tensor, so that a position begins where wide loads may."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnres.kernels.launch import launch, launch_scope

BLOCK = 4096


@triton.jit
def _pad_channels_kernel(
    y_ptr, x_ptr, positions, C: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    """y[p, c] = x[p, c] for c < C, else 0: (positions, PADDED)."""
    offsets = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    position = offsets // PADDED
    c = offsets - position * PADDED
    inside = position < positions
    x = tl.load(x_ptr + position * C + c, mask=inside & (c < C), other=0)
    tl.store(y_ptr + offsets, x, mask=inside)


def pad_channels(x: Tensor, padded: int) -> Tensor:
    """A channels_last ``x`` (N, C, H, W) filled up with zeros: (N, padded, H, W); or ``x`` itself."""
    n, channels, height, width = x.shape
    if padded == channels:
        return x
    y = torch.empty(
        (n, padded, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    with launch_scope(x):
        launch(
            _pad_channels_kernel,
            (-(-y.numel() // BLOCK),),
            y_ptr=y,
            x_ptr=x,
            positions=n * height * width,
            C=channels,
            PADDED=padded,
            BLOCK=BLOCK,
        )
    return y
