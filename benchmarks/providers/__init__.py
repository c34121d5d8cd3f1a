"""The providers by name. A provider is one of the implementations that are compared."""

from benchmarks.providers.bnres_layers import BNRES, BNRES_CONV_KERNEL
from benchmarks.providers.cudnn_frontend import CUDNN_FRONTEND
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
        CUDNN_FRONTEND,
        EAGER_FP16_CUDNN,
        BNRES_CONV_KERNEL,
        COMPILE_MAX_AUTOTUNE,
    )
}
