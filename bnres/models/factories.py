"""Models that are not bnres's own: a user's, torchvision's, timm's."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from operator import attrgetter
from types import ModuleType
from typing import Any

import torch
from torch import nn

from bnres.fusion.dynamo import is_compiled

# ImageNet's classes, which bnres's, torchvision's and timm's models have by default.
NUM_CLASSES = 1000


def is_factory(name: str) -> bool:
    """Whether the name of a model names a factory, ``PACKAGE.MODULE:FACTORY``."""
    return ":" in name


def make_model(
    name: str, num_classes: int | None = None, in_channels: int | None = None
) -> nn.Module:
    """The model that a factory returns.

    Args:
        name: ``PACKAGE.MODULE:FACTORY``; ``torchvision:NAME`` and ``timm:NAME`` are models of theirs.
            The current folder can be imported.
        num_classes, in_channels: what a factory is given if its signature names them. ``in_chans``
            is another name of ``in_channels``. A factory that needs ``num_classes`` gets 1000 by
            default.

    Raises:
        ValueError: if there is no such factory, it needs other arguments, or returns no module
            or a compiled one.
        ModuleNotFoundError: if a package that the factory needs is missing.
    """
    module, _, factory = name.partition(":")
    if module == "torchvision":
        return _of_torchvision(factory, num_classes)
    if module == "timm":
        return _of_timm(factory, num_classes, in_channels)
    build = _factory(name)
    given = {"num_classes": num_classes, "in_channels": in_channels, "in_chans": in_channels}
    try:
        signature = inspect.signature(build)
        needed = signature.parameters.get("num_classes")
        if num_classes is None and needed is not None and needed.default is needed.empty:
            given["num_classes"] = NUM_CLASSES
        named = {k: v for k, v in given.items() if v is not None and k in signature.parameters}
        signature.bind(**named)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model {name!r}: {error}") from error
    model = build(**named)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model must return a torch.nn.Module, but {name!r} returned {type(model).__name__}"
        )
    if is_compiled(model) or isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"model must return a module that is not compiled, but {name!r} returned "
            f"{type(model).__name__}; --compile compiles it"
        )
    return model


def _factory(name: str) -> Callable[..., Any]:
    """The object that a name stands for, once it is known to be a factory."""
    path, _, attribute = name.partition(":")
    names = [*path.split("."), *attribute.split(".")]
    if not all(each.isidentifier() for each in names):
        raise ValueError(f"model must be PACKAGE.MODULE:FACTORY, got {name!r}")
    module = _import(path)
    try:
        found: Any = attrgetter(attribute)(module)
    except AttributeError as error:
        raise ValueError(f"model: module {path!r} has no {attribute!r}") from error
    if isinstance(found, nn.Module):
        raise ValueError(
            f"model must name a function that returns a new module, but {name!r} is a module, "
            f"{type(found).__name__}"
        )
    if not callable(found):
        raise ValueError(
            f"model must name a callable, but {name!r} is of type {type(found).__name__}"
        )
    return found  # type: ignore[no-any-return]


def _import(path: str) -> ModuleType:
    """A module, from the current folder too, as with ``python -m``."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        # What a module draws when it is imported, once a process, must not change the weights.
        with torch.random.fork_rng([]):
            return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise  # the user's module was found, and imports one that is missing
        raise ValueError(
            f"model: there is no module {error.name!r}, neither in the current folder nor installed"
        ) from error


def _of_torchvision(name: str, num_classes: int | None) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ValueError(f"model: torchvision has no model {name!r} that classifies images")
    options = {} if num_classes is None else {"num_classes": num_classes}
    return models.get_model(name, weights=None, **options)  # type: ignore[no-any-return]


def _of_timm(name: str, num_classes: int | None, in_channels: int | None) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise ValueError(f"model: timm has no model {name!r}")
    given: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}
    return timm.create_model(name, **{k: v for k, v in given.items() if v is not None})
