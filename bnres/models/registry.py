"""Models by name, for the command line and for benchmarks."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from bnres.fusion import fuse
from bnres.models.factories import is_factory, make_model
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

# Models that are not listed here have the input shape DEFAULT_INPUT_SHAPE.
INPUT_SHAPES = {
    "resnet18-seed": (1, 1, 224, 224),
    "resnet18-seed-cifar": (1, 3, 32, 32),
    "lenet-seed": (1, 1, 28, 28),
}
DEFAULT_INPUT_SHAPE = (1, 3, 224, 224)


def check_model_name(name: str) -> None:
    """Raises a ValueError unless a name is in `MODELS` or has the form of a factory's name."""
    if name not in MODELS and not is_factory(name):
        raise ValueError(
            f"model must be one of {', '.join(MODELS)}, or torchvision:NAME, timm:NAME or "
            f"PACKAGE.MODULE:FACTORY, got {name!r}"
        )


def create_model(name: str, *, fused: bool = True, **options: Any) -> nn.Module:
    """Builds a model of `MODELS`, or calls a factory.

    Args:
        name: a name in `MODELS`, or a name that `make_model` accepts: ``torchvision:NAME``,
            ``timm:NAME`` or ``PACKAGE.MODULE:FACTORY``.
        fused: whether to build the model from fused layers. A factory's model is fused by
            `bnres.fuse`.
        options: options of the model. A factory only accepts ``num_classes`` and ``in_channels``.

    Raises:
        ValueError: if the name is unknown, if the model does not have one of the options, or if
            `make_model` raises a ValueError.
    """
    check_model_name(name)
    if is_factory(name):
        for option in options.keys() - {"num_classes", "in_channels"}:
            raise ValueError(f"{option} works only with models of bnres, got model {name!r}")
        model = make_model(name, **options)
        return fuse(model, inplace=True) if fused else model
    build = MODELS[name]
    try:
        inspect.signature(build).bind(fused=fused, **options)
    except TypeError as error:
        raise ValueError(f"model {name!r}: {error}") from error
    return build(fused=fused, **options)
