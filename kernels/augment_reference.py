"""Computes the fused augmentation in plain torch, on the CPU or a GPU.

Small images are resized as a batch by two matrix products, one along each axis. The matrices also
crop, flip and antialias. Large images are resized one by one, because matrix products would be
slower.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bnres.kernels.augment_plan import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    ORDER_BITS,
    SATURATION,
    AugmentDraws,
    AugmentPlan,
)

LUMA = (0.2989, 0.587, 0.114)
# Images of at most this height and width are resized by matrix products, which is faster on a CPU.
LARGEST_PRODUCT = 64
# A batch is processed in chunks whose fp32 values have at most this many bytes, so that
# intermediate results stay in a core's cache. An image with more bytes is a chunk by itself.
CHUNK_BYTES = 1 << 22


def augment_ref(x: Tensor, draws: AugmentDraws, plan: AugmentPlan) -> Tensor:
    """Returns the result of `bnres.kernels.augment.augment` for the same arguments."""
    n, channels, height, width = x.shape
    y = x.new_empty((n, channels, plan.height, plan.width), dtype=plan.dtype)
    y = y.contiguous(memory_format=plan.memory_format)
    image_bytes = channels * max(height * width, plan.height * plan.width) * 4
    count = max(CHUNK_BYTES // image_bytes, 1)
    for start in range(0, n, count):
        chunk = slice(start, start + count)
        y[chunk] = _augmented(x[chunk], AugmentDraws(*(d[chunk] for d in draws)), plan)
    return y


def _augmented(x: Tensor, draws: AugmentDraws, plan: AugmentPlan) -> Tensor:
    y = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    if plan.has_color and plan.color_first:
        y = jitter_ref(y, draws)
    y = crop_resize_flip_ref(y, draws.geometry, plan)
    if plan.has_color and not plan.color_first:
        y = jitter_ref(y, draws)
    if plan.mean is not None:
        shape = (1, -1, 1, 1)
        mean, std = (y.new_tensor(v).view(shape) for v in (plan.mean, plan.std))
        y = (y - mean) / std
    return y


def crop_resize_flip_ref(x: Tensor, geometry: Tensor, plan: AugmentPlan) -> Tensor:
    """Crops each image to its box, resizes the box with antialiasing, and flips the result.

    Returns (N, C, plan.height, plan.width). Without ``plan.resizes``, the box isn't resized.
    """
    top, left, height, width, flip_h, flip_w = geometry.unbind(1)
    if not plan.resizes:
        return _cropped(x, top, left, flip_h, flip_w, plan)
    if max(x.shape[2:]) > LARGEST_PRODUCT:
        return _resized_one_by_one(x, geometry, plan)
    rows = axis_weights(top, height, flip_h, x.shape[2], plan.height)
    cols = axis_weights(left, width, flip_w, x.shape[3], plan.width)
    # Resize along the width first, then along the height, as torch does.
    y = torch.einsum("nij,ncjw->nciw", rows, torch.einsum("ncjk,nwk->ncjw", x, cols))
    # A matrix product spreads a NaN or inf over whole rows, because 0 * NaN and 0 * inf are NaN.
    # Images with such values are resized without a product.
    spread = (~x.flatten(1).sum(1).isfinite()).nonzero()[:, 0]
    if len(spread):
        y[spread] = _resized_one_by_one(x[spread], geometry[spread], plan)
    return y


def _resized_one_by_one(x: Tensor, geometry: Tensor, plan: AugmentPlan) -> Tensor:
    size = (plan.height, plan.width)
    y = x.new_empty((*x.shape[:2], *size))
    for out, image, draw in zip(y, x, geometry.tolist(), strict=True):
        top, left, height, width, flip_h, flip_w = draw
        box = image[None, :, top : top + height, left : left + width]
        resized = F.interpolate(box, size, mode="bilinear", antialias=True)[0]
        axes = [axis for axis, flip in ((1, flip_h), (2, flip_w)) if flip]
        out.copy_(resized.flip(axes))
    return y


def _cropped(
    x: Tensor, top: Tensor, left: Tensor, flip_h: Tensor, flip_w: Tensor, plan: AugmentPlan
) -> Tensor:
    """Crops and flips boxes that have the output's size; values outside the image are 0."""
    n, channels, height, width = x.shape
    rows = _positions(top, flip_h, plan.height)
    cols = _positions(left, flip_w, plan.width)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((cols >= 0) & (cols < width))[:, None]
    index = rows.clamp(0, height - 1)[:, :, None] * width + cols.clamp(0, width - 1)[:, None]
    index = index.flatten(1)[:, None].expand(-1, channels, -1)
    found = x.flatten(2).gather(2, index).view(n, channels, plan.height, plan.width)
    return torch.where(inside[:, None], found, 0.0)


def _positions(start: Tensor, flip: Tensor, size: int) -> Tensor:
    """Returns the source position of each output position along an axis: (N, size)."""
    steps = torch.arange(size, device=start.device)
    steps = torch.where(flip[:, None] != 0, size - 1 - steps, steps)
    return start[:, None].long() + steps


def axis_weights(start: Tensor, length: Tensor, flip: Tensor, size: int, out: int) -> Tensor:
    """Returns the weights of an antialiased resize along an axis: (N, out, size).

    Args:
        start, length: int (N,), the first position and the length of each image's box.
        flip: int (N,), nonzero for each image that is flipped along this axis.
        size: size of the source along this axis.
        out: size of the output along this axis.
    """
    scale = (length.float() / out)[:, None, None]
    support = scale.clamp_min(1.0)
    steps = torch.arange(out, device=start.device, dtype=torch.float32)[None, :, None]
    steps = torch.where(flip[:, None, None] != 0, out - 1 - steps, steps)
    centre = scale * (steps + 0.5)
    first = (centre - support + 0.5).int().clamp_min(0)
    last = torch.minimum((centre + support + 0.5).int(), length[:, None, None])
    at = torch.arange(size, device=start.device)[None, None, :] - start[:, None, None]
    weights = (1 - ((at - centre + 0.5) / support).abs()).clamp_min(0)
    weights = torch.where((at >= first) & (at < last), weights, 0.0)
    return weights / weights.sum(2, keepdim=True)


def jitter_ref(x: Tensor, draws: AugmentDraws) -> Tensor:
    """Applies each image's colour operations in the order drawn for it."""
    x = x.clone()
    operations = {BRIGHTNESS: _brightness, CONTRAST: _contrast, SATURATION: _saturation, HUE: _hue}
    for step in range(len(operations)):
        numbers = (draws.order[:, 0] >> (ORDER_BITS * step)) & (2**ORDER_BITS - 1)
        for number, operation in operations.items():
            chosen = (numbers == number).nonzero()[:, 0]
            if len(chosen):
                factor = draws.factors[chosen, number].view(-1, 1, 1, 1)
                x[chosen] = operation(x[chosen], factor)
    return x


def grayscale_ref(x: Tensor) -> Tensor:
    """Returns the luma of ITU-R 601-2: (N, 1, H, W). Images of one channel stay unchanged."""
    if x.shape[1] == 1:
        return x
    r, g, b = x.unbind(1)
    return (r * LUMA[0] + g * LUMA[1] + b * LUMA[2])[:, None]


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = grayscale_ref(x).mean((1, 2, 3), keepdim=True)
    return (x * factor + (1 - factor) * mean).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return x
    return (x * factor + (1 - factor) * grayscale_ref(x)).clamp_(0, 1)


def _hue(x: Tensor, turn: Tensor) -> Tensor:
    """Shifts the hue by ``turn``, where 1 is a full turn.

    In HSV, v is the greatest channel. ``span`` is v minus the least channel.
    """
    if x.shape[1] == 1:
        return x
    r, g, b = x.unbind(1)
    low, v = x.aminmax(dim=1)
    span = v - low
    is_r, is_g = v == r, v == g
    h6 = torch.where(is_r, g - b, torch.where(is_g, b - r, r - g))
    h6 /= torch.where(span == 0, 1.0, span)
    h6 += torch.where(is_r, 0.0, torch.where(is_g, 2.0, 4.0)) + 6 * turn[:, 0]
    y = torch.empty_like(x)
    for channel, start in enumerate((5, 3, 1)):
        k = (h6 + start).remainder_(6)
        torch.sub(v, span * torch.minimum(k, 4 - k).clamp_(0, 1), out=y[:, channel])
    return y
