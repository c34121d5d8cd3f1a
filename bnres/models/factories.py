"""Builds models that bnres does not define, by calling factories.

A factory is a function that returns a model. It belongs to the user, to torchvision or to timm.
"""

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

# The number of ImageNet's classes, and the default in bnres, torchvision and timm.
NUM_CLASSES = 1000


def is_factory(name: str) -> bool:
    """Whether the name of a model has the form ``PACKAGE.MODULE:FACTORY``."""
    return ":" in name


def make_model(
    name: str, num_classes: int | None = None, in_channels: int | None = None
) -> nn.Module:
    """Calls a factory and returns its model.

    Args:
        name: ``PACKAGE.MODULE:FACTORY`` names a function of a module. The module may be in the
            current folder. ``torchvision:NAME`` and ``timm:NAME`` name a model of torchvision or
            timm.
        num_classes: passed to the factory if the factory has a parameter of this name. If this
            parameter has no default and ``num_classes`` is None, the factory gets 1000.
        in_channels: passed to the factory if the factory has a parameter ``in_channels`` or
            ``in_chans``.

    Raises:
        ValueError: if the factory does not exist, if it requires any other argument, if it does not
            return a `torch.nn.Module`, or if torch.compile or torch.jit has compiled the module
            that it returns.
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
            f"model must name a factory that returns a torch.nn.Module, but {name!r} returned "
            f"{type(model).__name__}"
        )
    if is_compiled(model) or isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"model must name a factory that returns an uncompiled module, but {name!r} returned "
            f"{type(model).__name__}; to compile the model, use --compile"
        )
    return model


def _factory(name: str) -> Callable[..., Any]:
    """Imports the factory called ``name``, which has the form ``PACKAGE.MODULE:FACTORY``."""
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
            f"model must name a function that returns a new module, but {name!r} is a module of "
            f"type {type(found).__name__}"
        )
    if not callable(found):
        raise ValueError(
            f"model must name a callable, but {name!r} is of type {type(found).__name__}"
        )
    return found  # type: ignore[no-any-return]


def _import(path: str) -> ModuleType:
    """Imports a module. As with ``python -m``, the module may be in the current folder."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        # A module may draw random numbers when it is first imported. The generator's state is then
        # restored, so that the weights of the model, which are drawn later, do not depend on this.
        with torch.random.fork_rng([]):
            return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise  # the module was found, but a module that it imports is missing
        raise ValueError(
            f"model: module {error.name!r} is neither installed nor in the current folder"
        ) from error


def _of_torchvision(name: str, num_classes: int | None) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ValueError(f"model: torchvision has no image classification model {name!r}")
    options = {} if num_classes is None else {"num_classes": num_classes}
    return models.get_model(name, weights=None, **options)  # type: ignore[no-any-return]


def _of_timm(name: str, num_classes: int | None, in_channels: int | None) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise ValueError(f"model: timm has no model {name!r}")
    given: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}
    return timm.create_model(name, **{k: v for k, v in given.items() if v is not None})
