"""Functional forms of the fused operations."""

from bnres.functional.batch_norm import batch_norm, batch_norm_act
from bnres.functional.conv import conv2d_batch_norm_act
from bnres.functional.dual import dual_batch_norm_act
from bnres.functional.max_pool import batch_norm_act_max_pool2d

__all__ = [
    "batch_norm",
    "batch_norm_act",
    "batch_norm_act_max_pool2d",
    "conv2d_batch_norm_act",
    "dual_batch_norm_act",
]
