"""Modules that compute a batch norm together with a residual, an activation or a max-pool."""

from bnres.nn.batchnorm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    BatchNormActMaxPool2d,
)
from bnres.nn.conv import ConvBatchNormAct2d, StemConv2d
from bnres.nn.sync import SyncBatchNorm, SyncBatchNormAct, SyncBatchNormActMaxPool2d

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BatchNormActMaxPool2d",
    "ConvBatchNormAct2d",
    "StemConv2d",
    "SyncBatchNorm",
    "SyncBatchNormAct",
    "SyncBatchNormActMaxPool2d",
]
