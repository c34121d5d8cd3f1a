"""Applies a chain of augmentations to a batch of images.

The chain crops an image, resizes it with antialiasing, flips it, applies up to four colour
operations, normalises the result and casts it. The colour operations may also come first. Each
image has its own random parameters and order of colour operations. One kernel applies the whole
chain, so only the final image is written to memory.

Contrast needs the mean gray value of its input. A program that computes a whole image also computes
this mean. For larger images, `_augment_gray_kernel` first computes sums of the gray values.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnres.kernels.augment_plan import AugmentDraws, AugmentPlan
from bnres.kernels.color import grayscale, jitter
from bnres.kernels.config import next_power_of_2
from bnres.kernels.device import round_to
from bnres.kernels.launch import Plan, launch

# A program computes a whole image if the output image has at most WHOLE_IMAGE pixels. If contrast
# precedes the crop, the source image must not have more pixels either. Otherwise, each program
# computes PART pixels.
WHOLE_IMAGE = 1024
PART = 256


@triton.jit
def _pixel(x_ptr, row, col, H, W, stride_h, stride_w, stride_c, mask, CHANNELS: tl.constexpr):
    """Returns red, green and blue at a position, and whether the position is inside the image.

    uint8 values are scaled to the range 0 to 1. If the image has one channel, the three values are
    equal. Outside the image all three are 0.
    """
    mask = mask & (row >= 0) & (row < H) & (col >= 0) & (col < W)
    ptr = x_ptr + (row * stride_h + col * stride_w)
    r = tl.load(ptr, mask=mask, other=0)
    g, b = r, r
    if CHANNELS == 3:
        g = tl.load(ptr + stride_c, mask=mask, other=0)
        b = tl.load(ptr + 2 * stride_c, mask=mask, other=0)
    r, g, b = r.to(tl.float32), g.to(tl.float32), b.to(tl.float32)
    if x_ptr.dtype.element_ty == tl.uint8:
        r, g, b = r / 255.0, g / 255.0, b / 255.0
    return r, g, b, mask


@triton.jit
def _axis(offs, scale, length):
    """Returns (centre, half width, first, end) of each output position's filter along an axis.

    The filter is a triangle over the positions ``first`` to ``end - 1`` of the crop. Torch's
    antialiased resize reads exactly these positions. One position more would matter even with
    weight 0, because 0·NaN is NaN.
    """
    support = tl.maximum(scale, 1.0)
    centre = scale * (offs.to(tl.float32) + 0.5)
    first = tl.maximum((centre - support + 0.5).to(tl.int32), 0)
    end = tl.minimum((centre + support + 0.5).to(tl.int32), length)
    end = tl.where(scale == 1.0, first + 1, end)  # if the size doesn't change, values are copied
    return centre, support, first, end


@triton.jit
def _resampled(
    x_ptr,
    offs_h, offs_w, top, left, height, width, H, W, OH, OW, stride_h, stride_w, stride_c, mask,
    order, stop, factors, gray_mean,
    CHANNELS: tl.constexpr, RESIZES: tl.constexpr, JITTERS: tl.constexpr,
):  # fmt: skip
    """Returns red, green and blue of the resized image at the positions (offs_h, offs_w).

    The box (top, left, height, width) of the source is resized to (OH, OW). Without RESIZES the box
    has this size already and is copied. With JITTERS, the colour operations are applied to the
    source before the resize.
    """
    if not RESIZES:
        r, g, b, inside = _pixel(
            x_ptr, top + offs_h, left + offs_w, H, W, stride_h, stride_w, stride_c, mask, CHANNELS
        )
        if JITTERS:
            r, g, b = jitter(r, g, b, order, 0, stop, factors, gray_mean, CHANNELS)
            r, g, b = tl.where(inside, r, 0.0), tl.where(inside, g, 0.0), tl.where(inside, b, 0.0)
        return r, g, b
    scale_h, scale_w = height.to(tl.float32) / OH, width.to(tl.float32) / OW
    centre_h, support_h, first_h, end_h = _axis(offs_h, scale_h, height)
    centre_w, support_w, first_w, end_w = _axis(offs_w, scale_w, width)
    sum_r = tl.zeros(offs_h.shape, tl.float32)
    sum_g, sum_b, total = sum_r, sum_r, sum_r
    taps_h = (2 * support_h).to(tl.int32) + 2
    taps_w = (2 * support_w).to(tl.int32) + 2
    for tap_h in range(0, taps_h):
        at_h = first_h + tap_h
        weight_h = 1.0 - tl.abs((at_h.to(tl.float32) - centre_h + 0.5) / support_h)
        for tap_w in range(0, taps_w):
            at_w = first_w + tap_w
            weight = 1.0 - tl.abs((at_w.to(tl.float32) - centre_w + 0.5) / support_w)
            tapped = (at_h < end_h) & (at_w < end_w)
            weight = tl.where(tapped, tl.maximum(weight_h, 0.0) * tl.maximum(weight, 0.0), 0.0)
            r, g, b, _ = _pixel(
                x_ptr, top + at_h, left + at_w, H, W, stride_h, stride_w, stride_c,
                mask & tapped, CHANNELS,
            )  # fmt: skip
            if JITTERS:
                r, g, b = jitter(r, g, b, order, 0, stop, factors, gray_mean, CHANNELS)
            sum_r += weight * r
            sum_g += weight * g
            sum_b += weight * b
            total += weight
    total = tl.where(mask, total, 1.0)
    return sum_r / total, sum_g / total, sum_b / total


@triton.jit
def _color_draws(order_ptr, factors_ptr, n):
    """Loads image ``n``'s packed order, position of contrast and factors, as in `AugmentDraws`."""
    factors = (
        tl.load(factors_ptr + 4 * n),
        tl.load(factors_ptr + 4 * n + 1),
        tl.load(factors_ptr + 4 * n + 2),
        tl.load(factors_ptr + 4 * n + 3),
    )
    return tl.load(order_ptr + 2 * n), tl.load(order_ptr + 2 * n + 1), factors


@triton.jit
def _cropped(
    x_ptr, geometry_ptr,
    n, offs, H, W, OH, OW, stride_h, stride_w, stride_c, order, factors, gray_mean,
    CHANNELS: tl.constexpr, RESIZES: tl.constexpr, JITTERS: tl.constexpr,
):  # fmt: skip
    """Returns red, green and blue of the cropped, resized and flipped image ``n``.

    ``offs`` are positions in the output. With JITTERS, the colour operations are applied to the
    source before the crop.
    """
    geometry_ptr += 6 * n
    top, left = tl.load(geometry_ptr), tl.load(geometry_ptr + 1)
    height, width = tl.load(geometry_ptr + 2), tl.load(geometry_ptr + 3)
    flip_h, flip_w = tl.load(geometry_ptr + 4), tl.load(geometry_ptr + 5)
    row = offs // OW
    col = offs - row * OW
    mask = offs < OH * OW
    row = tl.where(flip_h != 0, OH - 1 - row, row)
    col = tl.where(flip_w != 0, OW - 1 - col, col)
    return _resampled(
        x_ptr, row, col, top, left, height, width, H, W, OH, OW, stride_h, stride_w, stride_c,
        mask, order, 4, factors, gray_mean, CHANNELS, RESIZES, JITTERS,
    )  # fmt: skip


@triton.jit
def _gray_sum(
    x_ptr,
    part, order, contrast_at, factors, H, W, stride_h, stride_w, stride_c,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Returns the sum of the gray values over BLOCK pixels of the source image.

    The colour operations that precede contrast are applied first.
    """
    offs = part * BLOCK + tl.arange(0, BLOCK)
    row, mask = offs // W, offs < H * W
    r, g, b, _ = _pixel(
        x_ptr, row, offs - row * W, H, W, stride_h, stride_w, stride_c, mask, CHANNELS
    )
    r, g, b = jitter(r, g, b, order, 0, contrast_at, factors, 0.0, CHANNELS)
    return tl.sum(tl.where(mask, grayscale(r, g, b, CHANNELS), 0.0), axis=0)


@triton.jit
def _augment_gray_kernel(
    gray_ptr, x_ptr, geometry_ptr, order_ptr, factors_ptr,
    H, W, OH, OW, stride_xn, stride_xc, stride_xh, stride_xw, parts,
    CHANNELS: tl.constexpr, RESIZES: tl.constexpr, COLOR_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores the sum of the gray values over each part of each image: (N, parts).

    A part has BLOCK pixels. The colour operations that precede contrast are applied first. With
    COLOR_FIRST the sum is over the source image, otherwise over the cropped and resized image.
    """
    n = tl.program_id(0) // parts
    part = tl.program_id(0) - n * parts
    x_ptr += tl.cast(n, tl.int64) * stride_xn
    order, contrast_at, factors = _color_draws(order_ptr, factors_ptr, n)
    if COLOR_FIRST:
        gray = _gray_sum(
            x_ptr, part, order, contrast_at, factors, H, W, stride_xh, stride_xw, stride_xc,
            CHANNELS, BLOCK,
        )  # fmt: skip
    else:
        offs = part * BLOCK + tl.arange(0, BLOCK)
        r, g, b = _cropped(
            x_ptr, geometry_ptr, n, offs, H, W, OH, OW, stride_xh, stride_xw, stride_xc, order,
            factors, 0.0, CHANNELS, RESIZES, False,
        )  # fmt: skip
        r, g, b = jitter(r, g, b, order, 0, contrast_at, factors, 0.0, CHANNELS)
        grays = tl.where(offs < OH * OW, grayscale(r, g, b, CHANNELS), 0.0)
        gray = tl.sum(grays, axis=0)
    tl.store(gray_ptr + n * parts + part, gray)


@triton.jit
def _augment_kernel(
    y_ptr, gray_ptr, x_ptr, geometry_ptr, order_ptr, factors_ptr,
    mean_ptr, std_ptr,
    H, W, OH, OW, stride_xn, stride_xc, stride_xh, stride_xw, stride_yn, stride_yc, stride_yp,
    parts, gray_parts,
    CHANNELS: tl.constexpr, RESIZES: tl.constexpr, HAS_COLOR: tl.constexpr,
    HAS_CONTRAST: tl.constexpr, COLOR_FIRST: tl.constexpr, PARTS_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores y = (colours(flips(resize(crop(x)))) − mean)/std, of shape (N, C, OH, OW).

    With COLOR_FIRST the colour operations are applied to x, before the crop.
    """
    n = tl.program_id(0) // parts
    part = tl.program_id(0) - n * parts
    x_ptr += tl.cast(n, tl.int64) * stride_xn
    offs = part * BLOCK + tl.arange(0, BLOCK)
    mask = offs < OH * OW
    order, contrast_at, factors, gray_mean = 0, 0, (0.0, 0.0, 0.0, 0.0), 0.0
    if HAS_COLOR:
        order, contrast_at, factors = _color_draws(order_ptr, factors_ptr, n)
    if gray_ptr is not None:
        offs_p = tl.arange(0, PARTS_POW2)
        sums = tl.load(gray_ptr + n * gray_parts + offs_p, mask=offs_p < gray_parts, other=0.0)
        gray_mean = tl.sum(sums, axis=0) / ((H * W) if COLOR_FIRST else (OH * OW))
    if HAS_CONTRAST and COLOR_FIRST and gray_ptr is None:
        gray_mean = _gray_sum(
            x_ptr, part, order, contrast_at, factors, H, W, stride_xh, stride_xw, stride_xc,
            CHANNELS, BLOCK,
        ) / (H * W)  # fmt: skip
    r, g, b = _cropped(
        x_ptr, geometry_ptr, n, offs, H, W, OH, OW, stride_xh, stride_xw, stride_xc, order,
        factors, gray_mean, CHANNELS, RESIZES, HAS_COLOR and COLOR_FIRST,
    )  # fmt: skip
    if HAS_COLOR and not COLOR_FIRST:
        start = 0
        if HAS_CONTRAST and gray_ptr is None:
            r, g, b = jitter(r, g, b, order, 0, contrast_at, factors, 0.0, CHANNELS)
            start = contrast_at
            grays = tl.where(mask, grayscale(r, g, b, CHANNELS), 0.0)
            gray_mean = tl.sum(grays, axis=0) / (OH * OW)
        r, g, b = jitter(r, g, b, order, start, 4, factors, gray_mean, CHANNELS)
    if mean_ptr is not None:
        r = (r - tl.load(mean_ptr)) / tl.load(std_ptr)
        if CHANNELS == 3:
            g = (g - tl.load(mean_ptr + 1)) / tl.load(std_ptr + 1)
            b = (b - tl.load(mean_ptr + 2)) / tl.load(std_ptr + 2)
    out = y_ptr + tl.cast(n, tl.int64) * stride_yn + offs * stride_yp
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    tl.store(out, round_to(r, dtype), mask=mask)
    if CHANNELS == 3:
        tl.store(out + stride_yc, round_to(g, dtype), mask=mask)
        tl.store(out + 2 * stride_yc, round_to(b, dtype), mask=mask)


@cache
def _channel_values(values: tuple[float, ...] | None, device: torch.device) -> Tensor | None:
    """Returns one value per channel as a tensor on ``device``, or None if ``values`` is None."""
    return None if values is None else torch.tensor(values, dtype=torch.float32, device=device)


def augment(x: Tensor, draws: AugmentDraws, plan: AugmentPlan) -> Tensor:
    """Applies the chain of ``plan`` to a batch.

    Args:
        x: (N, C, H, W) with 1 or 3 channels. The dtype is uint8, or floating point with values
            from 0 to 1.
        draws: the parameters of each image, on the device of ``x``.
        plan: the chain.

    Returns:
        A tensor (N, C, plan.height, plan.width) in the dtype ``plan.dtype``.
    """
    n, channels, height, width = x.shape
    y = torch.empty(
        (n, channels, plan.height, plan.width), dtype=plan.dtype, device=x.device,
        memory_format=plan.memory_format,
    )  # fmt: skip
    if not x.numel():
        return y
    if (
        sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
        >= 2**31
    ):
        x = x.contiguous()  # the kernel computes offsets within an image in 32 bits
    positions = plan.height * plan.width
    gray_positions = height * width if plan.color_first else positions
    read = max(positions, gray_positions) if plan.has_contrast else positions
    whole = read <= WHOLE_IMAGE
    block = next_power_of_2(read) if whole else PART
    gray_parts = -(-gray_positions // block)
    mean, std = _channel_values(plan.mean, x.device), _channel_values(plan.std, x.device)
    gray = None
    parts = -(-positions // block)
    shared: dict[str, Any] = {
        "x_ptr": x,
        "geometry_ptr": draws.geometry,
        "order_ptr": draws.order,
        "factors_ptr": draws.factors,
        "H": height,
        "W": width,
        "OH": plan.height,
        "OW": plan.width,
        "stride_xn": x.stride(0),
        "stride_xc": x.stride(1),
        "stride_xh": x.stride(2),
        "stride_xw": x.stride(3),
        "CHANNELS": channels,
        "RESIZES": plan.resizes,
        "COLOR_FIRST": plan.color_first,
        "BLOCK": block,
        "num_warps": 8 if whole else 4,
    }
    if plan.has_contrast and not whole:
        gray = torch.empty((n, gray_parts), dtype=torch.float32, device=x.device)
        launch(
            _augment_gray_kernel, Plan((gray_parts * n,), shared), gray_ptr=gray, parts=gray_parts
        )
    launch(
        _augment_kernel,
        Plan((parts * n,), shared),
        y_ptr=y,
        gray_ptr=gray,
        mean_ptr=mean,
        std_ptr=std,
        stride_yn=y.stride(0),
        stride_yc=y.stride(1),
        stride_yp=y.stride(3),  # no gaps between rows, so flattened positions have this stride
        parts=parts,
        gray_parts=gray_parts,
        HAS_COLOR=plan.has_color,
        HAS_CONTRAST=plan.has_contrast,
        PARTS_POW2=next_power_of_2(gray_parts),
    )
    return y
