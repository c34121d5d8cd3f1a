"""Models by name, for the command line and for benchmarks."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from bnres.models.resnet import resnet18, resnet34, resnet50, resnet101, resnet152
from bnres.models.seed import lenet_seed, resnet18_seed, resnet18_seed_cifar

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
    "resnet18-seed": resnet18_seed,
    "resnet18-seed-cifar": resnet18_seed_cifar,
    "lenet-seed": lenet_seed,
}


# Inputs that the nets with a fixed size or number of channels are made for.
INPUT_SHAPES = {
    "resnet18-seed": (1, 1, 224, 224),
    "resnet18-seed-cifar": (1, 3, 32, 32),
    "lenet-seed": (1, 1, 28, 28),
}
DEFAULT_INPUT_SHAPE = (1, 3, 224, 224)


def create_model(name: str, **options: Any) -> nn.Module:
    """Builds a model of `MODELS`.

    Raises:
        ValueError: for an unknown name, or an option that the model does not have.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    build = MODELS[name]
    try:
        inspect.signature(build).bind(**options)
    except TypeError as error:
        raise ValueError(f"model {name!r}: {error}") from error
    return build(**options)
