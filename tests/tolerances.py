"""How far a result may be from its fp64 reference, by dtype: the one table of the tests."""

import torch
from torch import Tensor

# Error over the largest value of the reference (at least 1): a few rounding steps of the dtype,
# and for what sums over some hundred to thousand elements add to them.
TOLERANCE = {
    torch.float64: 1e-12,  # 2⁻⁵² ≈ 2.2e-16, sums of up to 10⁴ terms
    torch.float32: 3e-6,  # 2⁻²³ ≈ 1.2e-7, sums of up to some hundred terms
    torch.float16: 4e-3,  # 2⁻¹⁰ ≈ 9.8e-4, inputs and outputs rounded once each
    torch.bfloat16: 3e-2,  # 2⁻⁷ ≈ 7.8e-3, likewise
}
# Of fp32 that is multiplied in TF32, which keeps 10 bits of the mantissa. Each of two operands is
# rounded, by 2⁻¹¹ at most, or cut off, by 2⁻¹⁰: 2⁻⁹ ≈ 2e-3 of a product at most, and twice that, as a
# sum of products can be smaller than they are. The interpreter multiplies in fp32.
TF32_TOLERANCE = 4e-3


def assert_close(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, *, tf32: bool = False
) -> None:
    """``actual`` is finite and as near to ``expected`` (fp64) as its dtype, or TF32, allows."""
    assert torch.isfinite(actual).all()
    error = (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    tolerance = TF32_TOLERANCE if tf32 else TOLERANCE[dtype]
    assert error <= tolerance * scale, f"error {error:.3g}, scale {scale:.3g}"
