"""The tests' tolerances: for each dtype, the allowed error against an fp64 reference."""

import torch
from torch import Tensor

from tests.device import DEVICE

# The greatest allowed error, divided by the largest absolute value of the reference, or by 1 if
# that value is below 1. This allows for a few roundings to the dtype, and for the errors of sums.
TOLERANCE = {
    torch.float64: 1e-12,  # eps is 2⁻⁵² ≈ 2.2e-16; sums of up to 10⁴ terms
    torch.float32: 3e-6,  # eps is 2⁻²³ ≈ 1.2e-7; sums of up to some hundred terms
    torch.float16: 4e-3,  # eps is 2⁻¹⁰ ≈ 9.8e-4; inputs and outputs are rounded once each
    torch.bfloat16: 3e-2,  # eps is 2⁻⁷ ≈ 7.8e-3; inputs and outputs are rounded once each
}
# The tolerance if fp32 numbers are multiplied in TF32, which keeps 10 bits of the mantissa. The
# relative error of an operand is at most 2⁻¹¹ if it is rounded, or 2⁻¹⁰ if it is truncated. So the
# relative error of a product is at most 2⁻⁹ ≈ 2e-3. The tolerance is twice as large, because a sum
# of products can be smaller than the products. The interpreter multiplies in fp32.
TF32_TOLERANCE = 4e-3


def formula_dtype(act: str | None) -> torch.dtype:
    """Returns the dtype whose tolerance applies if torch computes the activation ``act`` in fp64.

    It is fp32 for hardswish on a GPU, because torch's kernel multiplies by 1/6 in fp32.
    """
    return torch.float32 if act == "hardswish" and DEVICE == "cuda" else torch.float64


def assert_close(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, *, tf32: bool = False
) -> None:
    """Asserts that ``actual`` is finite and within the tolerance of ``expected``.

    Args:
        actual: the result.
        expected: the reference in fp64.
        dtype: the dtype whose tolerance is used.
        tf32: whether to use the tolerance of TF32 instead.
    """
    assert torch.isfinite(actual).all()
    error = (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    tolerance = TF32_TOLERANCE if tf32 else TOLERANCE[dtype]
    assert error <= tolerance * scale, f"error {error:.3g}, scale {scale:.3g}"
