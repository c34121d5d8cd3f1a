"""Models by name, for the command line and for benchmarks."""

from collections.abc import Callable
from typing import Any

from torch import nn

from bnres.models.resnet import resnet18, resnet34, resnet50, resnet101, resnet152
from bnres.models.seed import lenet_seed, resnet18_seed

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
    "resnet18-seed": resnet18_seed,
    "lenet-seed": lenet_seed,
}


def create_model(name: str, **options: Any) -> nn.Module:
    """Builds a model of `MODELS`.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name](**options)
