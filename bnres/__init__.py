"""Batch norm layers and functions for residual networks, computed by fused Triton kernels."""

from bnres import augment, functional, models, nn
from bnres.backend import backend, use_backend
from bnres.fusion import FusionReport, explain, fold, fuse, inductor, unfuse
from bnres.nn.sync import convert_sync_batchnorm, revert_sync_batchnorm
from bnres.recipes import recompute
from bnres.routes import use_conv_route

__version__ = "0.1.0"
__all__ = [
    "FusionReport",
    "__version__",
    "augment",
    "backend",
    "convert_sync_batchnorm",
    "explain",
    "fold",
    "functional",
    "fuse",
    "inductor",
    "models",
    "nn",
    "recompute",
    "revert_sync_batchnorm",
    "unfuse",
    "use_backend",
    "use_conv_route",
]
