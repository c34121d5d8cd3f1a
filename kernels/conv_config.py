"""Describes convolutions, and chooses the launch configurations of their kernel.

`conv_config` uses a heuristic derived from the sizes of tiles and of shared memory. The heuristic
has not been compared with other configurations on a GPU yet. `search_space` lists the
configurations that ``bnres tune`` measures.
"""

from dataclasses import dataclass, fields
from math import log2
from typing import Any

from bnres.kernels.config import next_power_of_2

# The matrix instructions of every target accept blocks with at least this many rows and columns.
MIN_BLOCK = 16
# In each step, a program sums over at most this many bytes of input channels.
STEP_BYTES = 128
# The kernel is used only for at least this many input channels. With fewer, the matrix instructions
# would mostly multiply padding.
MIN_CHANNELS = 8


@dataclass(frozen=True)
class Numbers:
    """The base class of dataclasses whose fields are integers.

    An operator registered in torch can't take a dataclass, so it gets these integers.
    """

    def as_tuple(self) -> tuple[int, ...]:
        """Returns the fields in order."""
        # dataclasses.astuple makes deep copies, which torch.compile cannot always trace.
        return tuple([getattr(self, field.name) for field in fields(self)])


@dataclass(frozen=True)
class ConvShape(Numbers):
    """Kernel size, stride, padding and dilation of a convolution, known at compile time."""

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
        """The number of positions in a window."""
        return self.kernel_h * self.kernel_w

    @property
    def options(self) -> dict[str, Any]:
        """Stride, padding and dilation, as keyword arguments for torch's convolutions."""
        return {
            "stride": (self.stride_h, self.stride_w),
            "padding": (self.padding_h, self.padding_w),
            "dilation": (self.dilation_h, self.dilation_w),
        }

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the output's height and width, as in `torch.nn.Conv2d`."""
        down = height + 2 * self.padding_h - self.dilation_h * (self.kernel_h - 1) - 1
        across = width + 2 * self.padding_w - self.dilation_w * (self.kernel_w - 1) - 1
        return down // self.stride_h + 1, across // self.stride_w + 1


@dataclass(frozen=True)
class ConvConfig(Numbers):
    """The tile and the resources of a program.

    The tile has ``block_m`` output positions and ``block_n`` output channels. Each step of the
    program sums over ``block_k`` input channels.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """Label for tables."""
        return (
            f"{self.block_m}x{self.block_n}x{self.block_k} warps {self.num_warps} "
            f"stages {self.num_stages}"
        )


def conv_config(rows: int, channels: int, out_channels: int, itemsize: int) -> ConvConfig:
    """Returns the configuration that the heuristic chooses.

    Args:
        rows: number of output positions, N·OH·OW.
        channels: number of input channels.
        out_channels: number of output channels.
        itemsize: bytes per element.
    """
    # If the kernel is compiled for sm_90 in fp32, a tile of 128 channels spills registers.
    widest = 128 if itemsize == 2 else 64
    block_n = min(max(next_power_of_2(out_channels), MIN_BLOCK), widest)
    block_k = min(max(next_power_of_2(channels), MIN_BLOCK), STEP_BYTES // itemsize)
    block_m = 128 if rows > 64 else 64
    return ConvConfig(block_m, block_n, block_k, num_warps=8 if block_n == 128 else 4, num_stages=3)


def search_space(rows: int, channels: int, out_channels: int, itemsize: int) -> list[ConvConfig]:
    """Returns the configurations to try.

    The first is the choice of `conv_config`. The others follow, with those most similar to it
    first.
    """
    first = conv_config(rows, channels, out_channels, itemsize)
    found = [first]
    for block_m in (64, 128, 256):
        for block_n in (64, 128, 256):
            for num_stages in (3, 4):
                tile = block_m * block_n
                shared = (block_m + block_n) * first.block_k * itemsize * num_stages
                if block_n > next_power_of_2(out_channels) or tile > 128 * 256 or shared > 2**17:
                    continue
                warps = 8 if tile >= 128 * 128 else 4
                config = ConvConfig(block_m, block_n, first.block_k, warps, num_stages)
                if config not in found:
                    found.append(config)

    def distance(config: ConvConfig) -> float:
        sizes = ((config.block_m, first.block_m), (config.block_n, first.block_n))
        doublings = sum(abs(log2(size / near)) for size, near in sizes)
        return doublings + abs(config.num_stages - first.num_stages)

    return sorted(found, key=distance)
