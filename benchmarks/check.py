"""Refuses a provider whose results are not the formula's, before it is timed."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Greatest relative error ||a - b|| / ||b|| of outputs and running statistics: two roundings to the
# dtype, and in fp32 what statistics over millions of values lose; a convolution in fp32 may use
# tf32, of 10 bits.
OUTPUT_TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-5}
TF32_TOLERANCE = 2**-9
# Of gradients: where x + residual is rounded around zero, a share of about eps of the elements has
# the other side of the ReLU, and an error of their own size: up to 2 sqrt(eps) of the norm.
GRADIENT_TOLERANCE = {torch.bfloat16: 2**-2.5, torch.float16: 2**-4, torch.float32: 2**-10}
# In the parameters' sums that share counts once, and each addend's rounding: 4 eps, in fp32 what the
# order of the sums loses.
SUM_TOLERANCE = {torch.bfloat16: 2**-5, torch.float16: 2**-8, torch.float32: 1e-4}


class WrongResult(Exception):
    """A provider computes something else."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; infinite for another shape."""
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
    """The greatest relative error.

    Args:
        name: of what is compared, for the error.
        actual, expected: the results.
        tolerance: the greatest relative error allowed.
        dtype: that the results must have, if it matters.

    Raises:
        WrongResult: if it is over the tolerance, or a result is missing.
    """
    if len(actual) != len(expected):
        raise WrongResult(f"{len(actual)} {name}s, expected {len(expected)}")
    for index, result in enumerate(actual):
        if dtype is not None and result.dtype != dtype:
            raise WrongResult(f"{name} {index} is of {result.dtype}, expected {dtype}")
    errors = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    for index, error in enumerate(errors):
        if not error <= tolerance:
            raise WrongResult(
                f"{name} {index}: relative error {error:.2g}, at most {tolerance:.2g} is allowed"
            )
    return max(errors, default=0.0)
