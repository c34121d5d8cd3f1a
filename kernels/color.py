"""Device functions that apply torchvision's colour operations to values in [0, 1].

The operations are brightness, contrast, saturation and hue. A channel that is NaN stays NaN, as in
torch.
"""

import triton
import triton.language as tl

# These numbers must be the same as in `bnres.kernels.augment_plan`.
BRIGHTNESS, CONTRAST, SATURATION, HUE = (tl.constexpr(number) for number in range(4))
NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def least(a, b):
    """Returns the smaller of two values, or NaN if either is NaN."""
    return tl.minimum(a, b, propagate_nan=NAN)


@triton.jit
def greatest(a, b):
    """Returns the greater of two values, or NaN if either is NaN."""
    return tl.maximum(a, b, propagate_nan=NAN)


@triton.jit
def clamp_unit(v):
    return least(greatest(v, 0.0), 1.0)


@triton.jit
def grayscale(r, g, b, CHANNELS: tl.constexpr):
    """Returns the luma of ITU-R 601-2, or ``r`` if the image has only one channel."""
    if CHANNELS == 3:
        return r * 0.2989 + g * 0.587 + b * 0.114
    return r


@triton.jit
def _hue_channel(v, span, h6, START: tl.constexpr):
    """Returns one channel of the colour that has hue h, saturation s and value v.

    ``span`` is v·s, and ``h6`` is 6·h. START is 5 for red, 3 for green and 1 for blue.
    """
    k = h6 + START
    k -= 6.0 * tl.floor(k / 6.0)
    return v - span * clamp_unit(least(k, 4.0 - k))


@triton.jit
def adjust_hue(r, g, b, turn):
    """Adds ``turn`` to the hue, where 1 is a full turn of the colour circle."""
    v = greatest(greatest(r, g), b)
    span = v - least(least(r, g), b)
    is_r, is_g = v == r, v == g
    h6 = tl.where(is_r, g - b, tl.where(is_g, b - r, r - g)) / tl.where(span == 0.0, 1.0, span)
    h6 += tl.where(is_r, 0.0, tl.where(is_g, 2.0, 4.0)) + 6.0 * turn
    return (
        _hue_channel(v, span, h6, 5),
        _hue_channel(v, span, h6, 3),
        _hue_channel(v, span, h6, 1),
    )


@triton.jit
def jitter(r, g, b, order, start, stop, factors, gray_mean, CHANNELS: tl.constexpr):
    """Applies the colour operations at the positions ``start`` to ``stop - 1`` of the order.

    Args:
        r, g, b: the channels.
        order: the image's packed order, as in `bnres.kernels.augment_plan`.
        start, stop: the first position in the order, and the position after the last.
        factors: the image's row of `bnres.kernels.augment_plan.AugmentDraws.factors`.
        gray_mean: the image's mean gray value, with which contrast blends each channel.
    """
    brightness, contrast, saturation, hue = factors
    for step in tl.static_range(4):
        operation = (order >> (4 * step)) & 15  # 4 is ORDER_BITS
        active = (step >= start) & (step < stop)
        if active & (operation == BRIGHTNESS):
            r, g, b = (
                clamp_unit(r * brightness),
                clamp_unit(g * brightness),
                clamp_unit(b * brightness),
            )
        if active & (operation == CONTRAST):
            shift = (1.0 - contrast) * gray_mean
            r, g, b = (
                clamp_unit(r * contrast + shift),
                clamp_unit(g * contrast + shift),
                clamp_unit(b * contrast + shift),
            )
        if CHANNELS == 3:
            if active & (operation == SATURATION):
                gray = (1.0 - saturation) * grayscale(r, g, b, CHANNELS)
                r, g, b = (
                    clamp_unit(r * saturation + gray),
                    clamp_unit(g * saturation + gray),
                    clamp_unit(b * saturation + gray),
                )
            if active & (operation == HUE):
                r, g, b = adjust_hue(r, g, b, hue)
    return r, g, b
