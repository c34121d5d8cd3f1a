"""The graph of a module's own forward, and what it holds for.

torch.fx runs the forward once with stand-ins for its inputs. What it decided on the way (attributes,
missing children, types of the inputs) is kept as a guard, for the graph says nothing of the rest.
"""

import builtins
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from bnres.fusion.nodes import IN_PLACE_OPERATORS

SCALARS = (bool, int, float, str, type(None))


class InPlaceProxy(fx.Proxy):
    """A stand-in that keeps ``x += y`` apart from ``x = x + y``, as torch.fx's own does not."""


def _in_place(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    function = getattr(operator, name)

    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in IN_PLACE_OPERATORS:
    setattr(InPlaceProxy, f"__{_name}__", _in_place(_name))


class OwnForwardTracer(fx.Tracer):
    """Traces one module's forward; its children stay calls."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return InPlaceProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@dataclass
class Guard:
    """What a graph was traced under."""

    attributes: dict[str, Any]
    missing: tuple[str, ...]
    not_instances: list[Any] = field(default_factory=list)

    def holds(self, module: nn.Module, inputs: tuple[Any, ...]) -> bool:
        """Whether the graph is the module's forward for these inputs."""
        state = module.__dict__
        for name, value in self.attributes.items():
            if state.get(name, self) != value:
                return False
        if any(module._modules.get(name) is not None for name in self.missing):
            return False
        return not any(isinstance(x, cls) for cls in self.not_instances for x in inputs)


def snapshot(module: nn.Module, training: bool) -> Guard:
    """The attributes that a forward can decide on, by value."""
    attributes = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, SCALARS) and not name.startswith("_")
    }
    attributes["training"] = training
    missing = tuple(name for name, child in module._modules.items() if child is None)
    return Guard(attributes, missing)


@contextmanager
def _noted_isinstance(module: nn.Module, guard: Guard) -> Iterator[None]:
    """Inside, what the module's code asks `isinstance` of a stand-in goes into the guard.

    A stand-in is no instance of a tensor or a list, so the graph is right for such inputs alone.
    """

    def noted(value: Any, cls: Any) -> bool:
        if isinstance(value, fx.Proxy):
            guard.not_instances.append(cls)
        return isinstance(value, cls)

    names = {cls.__module__ for cls in type(module).__mro__}
    spaces = [
        vars(sys.modules[name]) for name in names if name.split(".")[0] not in ("torch", "builtins")
    ]
    before = [space.get("isinstance", builtins) for space in spaces]
    for space in spaces:
        space["isinstance"] = noted
    try:
        yield
    finally:
        for space, value in zip(spaces, before, strict=True):
            if value is builtins:
                del space["isinstance"]
            else:
                space["isinstance"] = value


def trace(module: nn.Module, training: bool) -> tuple[fx.Graph, Guard]:
    """The graph of ``module``'s own forward in one mode.

    Raises:
        Exception: whatever the forward raises when it is given stand-ins.
    """
    guard = snapshot(module, training)
    before = module.training
    module.training = training
    try:
        with _noted_isinstance(module, guard):
            return OwnForwardTracer().trace(module), guard
    finally:
        module.training = before
