"""The dtypes that the kernels accept and compute in."""

import torch
from torch import Tensor

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def acc_type(x: Tensor) -> torch.dtype:
    """Returns the dtype of the statistics and sums of ``x``: fp64 if ``x`` is fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
