"""The windows of a pooling layer or a convolution."""

from dataclasses import dataclass
from typing import Any

import torch

from bnres.kernels.fields import Numbers


@dataclass(frozen=True)
class Window(Numbers):
    """Kernel size, stride, padding and dilation in two dimensions, known at compile time."""

    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int

    @property
    def taps(self) -> int:
        """Positions in a window."""
        return self.kernel_h * self.kernel_w

    @property
    def kernel_size(self) -> tuple[int, int]:
        return self.kernel_h, self.kernel_w

    @property
    def options(self) -> dict[str, Any]:
        """The arguments, but for kernel_size, of torch's functions."""
        return {
            "stride": (self.stride_h, self.stride_w),
            "padding": (self.padding_h, self.padding_w),
            "dilation": (self.dilation_h, self.dilation_w),
        }

    @property
    def argmax_dtype(self) -> torch.dtype:
        """What a position in a window is kept in."""
        return torch.uint8 if self.taps <= 256 else torch.int32

    @property
    def covering_h(self) -> int:
        """How many windows at most lie over a row."""
        return -(-((self.kernel_h - 1) * self.dilation_h + 1) // self.stride_h)

    @property
    def covering_w(self) -> int:
        """How many windows at most lie over a column."""
        return -(-((self.kernel_w - 1) * self.dilation_w + 1) // self.stride_w)

    def output_size(self, height: int, width: int, ceil_mode: bool = False) -> tuple[int, int]:
        """Windows down and across, as torch counts them."""
        return (
            _windows(
                height, self.kernel_h, self.stride_h, self.padding_h, self.dilation_h, ceil_mode
            ),
            _windows(
                width, self.kernel_w, self.stride_w, self.padding_w, self.dilation_w, ceil_mode
            ),
        )


def _windows(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> int:
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (-(-room // stride) if ceil else room // stride) + 1
    if ceil and (count - 1) * stride >= size + padding:
        count -= 1  # a window has to start inside the tensor or its left padding
    return count
