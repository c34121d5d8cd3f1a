"""Compares a provider's results with the reference before the provider is timed."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Tolerances are the greatest allowed relative errors ||a - b|| / ||b||, where b is the reference.
# For outputs in 16 bits, two roundings to the dtype are allowed. The tolerance for outputs in fp32
# and for running statistics allows for the error of statistics over millions of values.
OUTPUT_TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-5}
# A convolution in fp32 may use TF32, which has 10 bits of mantissa.
TF32_TOLERANCE = 2**-9
# Because of rounding, about a fraction eps of ReLU's inputs have the wrong sign, where eps is
# ``torch.finfo(dtype).eps``. At such an element, ReLU passes a gradient that it should stop, or
# stops a gradient that it should pass. So the whole gradient's relative error can be 2 sqrt(eps).
GRADIENT_TOLERANCE = {torch.bfloat16: 2**-2.5, torch.float16: 2**-4, torch.float32: 2**-10}
# The parameters' gradients are sums over a channel's elements. In 16 bits their tolerance is 4 eps,
# for ReLU's inputs with the wrong sign and for the rounding of each addend. In fp32 it allows for
# adding in a different order than the reference.
SUM_TOLERANCE = {torch.bfloat16: 2**-5, torch.float16: 2**-8, torch.float32: 1e-4}


class WrongResult(Exception):
    """Raised when a provider's result differs from the reference."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Returns ||actual - expected|| / ||expected||, or infinity if the shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    expected = expected.detach().double()
    difference = actual.detach().double() - expected
    return (difference.norm() / expected.norm().clamp_min(1e-30)).item()


def check(
    name: str,
    actual: Sequence[Tensor],
    expected: Sequence[Tensor],
    tolerance: float,
    dtype: torch.dtype | None = None,
) -> float:
    """Compares a provider's results with the reference, and returns the greatest relative error.

    Args:
        name: noun for one of the results, such as ``gradient``. Error messages use it.
        actual: the provider's results.
        expected: the reference's results.
        tolerance: the greatest relative error allowed.
        dtype: dtype that the results must have. None allows any dtype.

    Raises:
        WrongResult: if an error exceeds the tolerance or is NaN, or if the number of results, a
            shape or a dtype differs.
    """
    if len(actual) != len(expected):
        raise WrongResult(f"{len(actual)} {name}s, expected {len(expected)}")
    for index, result in enumerate(actual):
        if dtype is not None and result.dtype != dtype:
            raise WrongResult(f"{name} {index} has dtype {result.dtype}, expected {dtype}")
    errors = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    for index, error in enumerate(errors):
        if not error <= tolerance:
            raise WrongResult(
                f"{name} {index}: relative error {error:.2g}, expected at most {tolerance:.2g}"
            )
    return max(errors, default=0.0)
