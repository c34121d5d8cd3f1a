"""The first convolution of a ResNet: 7×7 with stride 2.

cuDNN has no fast bfloat16 kernel for three input channels. The convolution is therefore rewritten:
each 2×2 block of positions becomes one position with four times as many channels ("space to
depth"), and the 7×7 filters, padded to 8×8, become 4×4 filters with stride 1. The sums are the
same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bnres.backend import uses_kernels
from bnres.operations.call import needs_aten

KERNEL, STRIDE, PADDING = 7, 2, 3
MAX_CHANNELS = 4
# Channels of the rewritten input: 4 times MAX_CHANNELS, a multiple of 16 as tensor cores need.
BLOCK_CHANNELS = 16


def stem_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``conv2d(input, weight, bias, stride=2, padding=3)`` for 7×7 filters, a ResNet's first layer.

    Torch's convolution runs, but on a GPU its input may be rewritten by space to depth, which turns
    each 2×2 block of positions into one position. The input is rewritten if the convolution
    computes in bfloat16 (also under autocast), and if ``input`` is channels_last, has at most 4
    channels, has an even height and width, and needs no gradient. Only the order of additions then
    differs.

    Args:
        input: (N, C, H, W).
        weight: (K, C, 7, 7).
        bias: (K,) or None.

    Returns:
        (N, K, OH, OW), with OH = (H + 1) // 2 and OW = (W + 1) // 2.

    Raises:
        RuntimeError: if `torch.nn.functional.conv2d` raises it.

    Follows `torch.nn.functional.conv2d`. Space to depth is described by Ying et al.,
    arXiv 1811.06992.
    """
    if takes_blocks(input, weight):
        return conv_over_blocks(input, weight, bias)
    return F.conv2d(input, weight, bias, STRIDE, PADDING)


def takes_blocks(input: Tensor, weight: Tensor) -> bool:
    """Whether the convolution runs over a space-to-depth input, see `stem_conv2d`."""
    return (
        _on_gpu(input)
        and not needs_aten(input, weight)
        and not (input.requires_grad and torch.is_grad_enabled())
        and input.dim() == 4
        and input.shape[1] <= MAX_CHANNELS
        and weight.shape[1:] == (input.shape[1], KERNEL, KERNEL)
        and input.shape[2] % 2 == input.shape[3] % 2 == 0
        and input.is_contiguous(memory_format=torch.channels_last)
        and _dtype(input, weight) == torch.bfloat16
    )


def _on_gpu(input: Tensor) -> bool:
    return input.is_cuda and uses_kernels(input)


def _dtype(input: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype that the convolution computes in, or None if the operands' dtypes differ."""
    if torch.is_autocast_enabled(input.device.type):
        return torch.get_autocast_dtype(input.device.type)
    return input.dtype if input.dtype == weight.dtype else None


def conv_over_blocks(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`stem_conv2d` over a space-to-depth input. ``input`` gets no gradient.

    For output row i the 7 rows of a filter read input rows 2i − 3 to 2i + 3. A row of zeros is
    added before them, so that the filter's 8 rows read input rows 2i − 4 to 2i + 3. These input
    rows are exactly the rows of blocks i − 2 to i + 1.
    """
    n, channels, height, width = input.shape
    # The padding is three blocks of zeros along each axis: two before the image and one after it.
    shape = n, height // 2 + 3, width // 2 + 3, BLOCK_CHANNELS
    blocks = input.new_zeros(shape, dtype=_dtype(input, weight))
    inside = blocks[:, 2:-1, 2:-1, : 4 * channels].unflatten(3, (2, 2, channels))
    rows = input.detach().permute(0, 2, 3, 1).unflatten(1, (-1, 2)).unflatten(3, (-1, 2))
    inside.copy_(rows.permute(0, 1, 3, 2, 4, 5))
    filters = F.pad(weight, (1, 0, 1, 0)).unflatten(3, (4, 2)).unflatten(2, (4, 2))
    filters = filters.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)
    filters = F.pad(filters, (0, 0, 0, 0, 0, BLOCK_CHANNELS - 4 * channels))
    filters = filters.contiguous(memory_format=torch.channels_last)
    return F.conv2d(blocks.permute(0, 3, 1, 2), filters, bias)
