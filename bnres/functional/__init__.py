"""Functional forms of the fused operations."""

from bnres.operations.batch_norm_act import batch_norm, batch_norm_act
from bnres.operations.batch_norm_act_max_pool import batch_norm_act_max_pool2d
from bnres.operations.conv_batch_norm_act import conv2d_batch_norm_act
from bnres.operations.norms import BatchNormState
from bnres.operations.stem_conv import stem_conv2d
from bnres.operations.sync_batch_norm_act import sync_batch_norm_act

__all__ = [
    "BatchNormState",
    "batch_norm",
    "batch_norm_act",
    "batch_norm_act_max_pool2d",
    "conv2d_batch_norm_act",
    "stem_conv2d",
    "sync_batch_norm_act",
]
