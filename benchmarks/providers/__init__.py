"""Providers of the operations, by name."""

from benchmarks.providers.bnres_layers import BNRES, BNRES_CONV_KERNEL
from benchmarks.providers.torch_layers import (
    COMPILE,
    COMPILE_MAX_AUTOTUNE,
    EAGER,
    EAGER_FP16_CUDNN,
)

PROVIDERS = {
    provider.name: provider
    for provider in (
        BNRES,
        EAGER,
        COMPILE,
        EAGER_FP16_CUDNN,
        BNRES_CONV_KERNEL,
        COMPILE_MAX_AUTOTUNE,
    )
}
