"""The first convolution of a ResNet: 7×7 with stride 2.

cuDNN has no fast bfloat16 kernel for three input channels. A 4×4 convolution with stride 1 over a
space-to-depth input computes the same sums. `stem_conv2d` explains space-to-depth inputs. The 7×7
filters are padded to 8×8 and rearranged like the input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from bnres.backend import uses_kernels
from bnres.kernels.torch_internals import FakeTensor, FunctionalTensor, dispatches, is_known
from bnres.operations.call import needs_aten

KERNEL, STRIDE, PADDING = 7, 2, 3
# The supported numbers of input channels. One channel is not supported, because torch can't tell
# whether a tensor with one channel is channels_last.
CHANNELS = 2, 3, 4
# The dtypes that autocast casts.
AUTOCAST_DTYPES = {torch.float32, torch.float16, torch.bfloat16}
# The number of channels of the space-to-depth input, a multiple of 16 for the tensor cores.
BLOCK_CHANNELS = 16


def stem_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes ``conv2d(input, weight, bias, stride=2, padding=3)`` for 7×7 filters.

    This convolution is the first layer of a ResNet.

    On a GPU the convolution runs over a space-to-depth input, in which each 2×2 block of pixels is
    one pixel with four times as many channels. This requires:

    - a convolution that computes in bfloat16, with or without autocast
    - an ``input`` that is channels_last, with 2 to 4 channels and an even height and width
    - an ``input`` that needs no gradient

    Otherwise torch's convolution runs. It computes the same sums in another order.

    Args:
        input: (N, C, H, W).
        weight: (K, C, 7, 7).
        bias: (K,) or None.

    Returns:
        (N, K, OH, OW), where OH = (H + 1) // 2 and OW = (W + 1) // 2.

    Raises:
        RuntimeError: if `torch.nn.functional.conv2d` raises it.

    The convolution is that of `torch.nn.functional.conv2d`. Ying et al., arXiv 1811.06992, describe
    space-to-depth inputs.
    """
    if takes_blocks(input, weight):
        return conv_over_blocks(input, weight, bias)
    return F.conv2d(input, weight, bias, STRIDE, PADDING)


def takes_blocks(input: Tensor, weight: Tensor) -> bool:
    """Whether the convolution runs over a space-to-depth input, see `stem_conv2d`."""
    return (
        isinstance(input, Tensor)  # torch.fx traces with proxies, which are not tensors
        and _on_gpu(input)
        and not needs_aten(input, weight)
        # While torch.compile captures a call, it is not known which tensors are DTensors.
        and (is_compiling() or not any(map(_replaces_operators, (input, weight))))
        and not (input.requires_grad and torch.is_grad_enabled())
        and input.dim() == 4
        and input.shape[1] in CHANNELS
        and weight.shape[1:] == (input.shape[1], KERNEL, KERNEL)
        and all(map(_is_even, input.shape[2:]))
        and input.permute(0, 2, 3, 1).is_contiguous()
        and _dtype(input, weight) == torch.bfloat16
    )


def _on_gpu(input: Tensor) -> bool:
    return input.is_cuda and uses_kernels(input)


def _replaces_operators(t: Tensor) -> bool:
    """Whether the class of ``t`` replaces operators, like DTensor.

    torch.compile traces calls with the two classes that are excluded here.
    """
    return dispatches(t) and not isinstance(t, FakeTensor | FunctionalTensor)


def _is_even(size: int) -> bool:
    """Whether a size is known and even.

    Inductor can't order the strides of two unknown sizes.
    """
    return is_known(size) and size % 2 == 0


def _dtype(input: Tensor, weight: Tensor) -> torch.dtype | None:
    """Returns the dtype in which the convolution computes, or None if torch must choose it."""
    dtypes = {input.dtype, weight.dtype}
    if torch.is_autocast_enabled(input.device.type) and dtypes <= AUTOCAST_DTYPES:
        return torch.get_autocast_dtype(input.device.type)
    return input.dtype if len(dtypes) == 1 else None


def conv_over_blocks(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns the result of `stem_conv2d`, computed over a space-to-depth input.

    ``input`` must not need a gradient. For output row i, the 7 filter rows read the input rows
    2i − 3 to 2i + 3. A row of zeros is put before the filter's first row, so the filter also reads
    the input row 2i − 4. Block j has the input rows 2j and 2j + 1, so the eight input rows are the
    blocks i − 2 to i + 1. Columns are treated in the same way as rows.
    """
    n, channels, height, width = input.shape
    # Along each axis the image is padded with two blocks of zeros before it and one block after it.
    shape = n, height // 2 + 3, width // 2 + 3, BLOCK_CHANNELS
    blocks = input.new_zeros(shape, dtype=_dtype(input, weight))
    inside = blocks[:, 2:-1, 2:-1, : 4 * channels].unflatten(3, (2, 2, channels))
    rows = input.permute(0, 2, 3, 1).unflatten(1, (-1, 2)).unflatten(3, (-1, 2))
    inside.copy_(rows.permute(0, 1, 3, 2, 4, 5))
    filters = F.pad(weight, (1, 0, 1, 0)).unflatten(3, (4, 2)).unflatten(2, (4, 2))
    filters = filters.permute(0, 2, 4, 3, 5, 1).flatten(3)
    filters = F.pad(filters, (0, BLOCK_CHANNELS - 4 * channels))
    return F.conv2d(blocks.permute(0, 3, 1, 2), filters.permute(0, 3, 1, 2), bias)
