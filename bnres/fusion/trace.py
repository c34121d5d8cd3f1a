"""The graph of a module's own forward, and what it holds for.

torch.fx runs the forward once with stand-ins for its inputs. What it decided on the way (attributes,
missing children, types of the inputs) is kept as a guard, for the graph says nothing of the rest.
What no graph shows (contexts, side effects, random numbers) makes the forward unproved.
"""

import builtins
import copy
import dis
import gc
import operator
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnres.fusion.nodes import IN_PLACE_OPERATORS

SCALARS = (bool, int, float, str, type(None))
# The module's own machinery, on which no forward decides.
INTERNAL = frozenset(vars(nn.Module()))
# What tells a stand-in from a tensor, where it is not noted as `isinstance` is.
TYPE_QUESTIONS = frozenset(("type", "hasattr", "is_tensor", "callable"))


class NotProvedError(Exception):
    """Why nothing is known of a module's forward."""


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


def _is_plain(value: Any) -> bool:
    """Whether a value can be compared: a scalar, or a collection of such."""
    if isinstance(value, dict):
        return all(_is_plain(v) for v in (*value.keys(), *value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_plain(v) for v in value)
    return isinstance(value, SCALARS)


@dataclass
class Guard:
    """What a graph was traced under.

    Attributes:
        attributes: the module's plain attributes.
        missing: children that are None.
        inputs: how many inputs there are, each of them a tensor.
        not_instances: classes that an input must not be of.
    """

    attributes: dict[str, Any]
    missing: tuple[str, ...]
    inputs: int = 0
    not_instances: list[Any] = field(default_factory=list)

    def holds(self, module: nn.Module, inputs: tuple[Any, ...]) -> bool:
        """Whether the graph is the module's forward for these inputs."""
        state = module.__dict__
        for name, value in self.attributes.items():
            if name not in state or state[name] != value:
                return False
        if any(module._modules.get(name) is not None for name in self.missing):
            return False
        return len(inputs) == self.inputs and all(self._takes(x) for x in inputs)

    def _takes(self, x: Any) -> bool:
        """Whether an input is what its stand-in was taken for."""
        if not self.not_instances:
            return isinstance(x, Tensor)
        if any(isinstance(x, cls) for cls in self.not_instances):
            return False
        each = x if type(x) in (list, tuple) else [x]
        return all(isinstance(e, Tensor) for e in each)


def snapshot(module: nn.Module, training: bool) -> Guard:
    """The attributes that a forward can decide on, by value."""
    attributes = {
        name: copy.copy(value)
        for name, value in vars(module).items()
        if _is_plain(value) and name not in INTERNAL and not name.startswith("_bnres")
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


@cache
def _doubt(code: CodeType, notes_isinstance: bool) -> str:
    """What a function may do that no graph shows."""
    if any(i.opname == "PUSH_EXC_INFO" for i in dis.get_instructions(code)):
        return f"{code.co_name} has a with or a try"
    questions = TYPE_QUESTIONS if notes_isinstance else TYPE_QUESTIONS | {"isinstance"}
    asked = questions.intersection(code.co_names)
    return f"{code.co_name} asks {min(asked)} of something" if asked else ""


@contextmanager
def _noted_doubts() -> Iterator[list[str]]:
    """Inside, what the traced code does on its way and no graph shows."""
    found: list[str] = []
    own = {"torch", "bnres", *sys.stdlib_module_names} - {"__main__"}

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        code, space = frame.f_code, frame.f_globals
        if code.co_name == "decorate_context" or "torch/utils/checkpoint" in code.co_filename:
            found.append("its forward opens a context or a checkpoint")
        elif str(space.get("__name__")).split(".")[0] not in own:
            doubt = _doubt(code, "isinstance" in space)
            if doubt:
                found.append(doubt)

    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()  # what others have the collector call is none of the forward's doing
    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()


def _stand_in(module: nn.Module) -> nn.Module:
    """A module of the same class, children and parameters, with state of its own to change."""
    twin = copy.copy(module)
    state = {
        name: copy.copy(value) if isinstance(value, list | dict | set) else value
        for name, value in vars(module).items()
    }
    state["_buffers"] = {
        name: None if b is None else b.detach().clone() for name, b in module._buffers.items()
    }
    state.pop("forward", None)
    twin.__dict__ = state
    return twin


def _contents(module: nn.Module) -> dict[str, Any]:
    """What can be told apart after a forward: objects by identity, collections by their items."""
    state: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name == "training":
            continue
        if isinstance(value, dict):
            state[name] = {k: id(v) for k, v in value.items()}
        elif isinstance(value, list | set):
            state[name] = [id(v) for v in value]
        else:
            state[name] = id(value)
    for name, buffer in module._buffers.items():
        state[f"buffer {name}"] = None if buffer is None else (id(buffer), buffer._version)
    return state


@contextmanager
def _children_in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Inside, everything below a module is in one mode."""
    modes = [(m, m.training) for m in module.modules() if m is not module]
    for child, _ in modes:
        child.training = training
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


def trace(module: nn.Module, training: bool, grad: bool) -> tuple[fx.Graph, Guard]:
    """The graph of ``module``'s own forward in one mode, with gradients recorded or not.

    Its children are in training mode where gradients are recorded, else in evaluation: a forward
    that looks at either has two graphs.

    Raises:
        NotProvedError: if the forward can't be traced, or does what no graph shows.
    """
    guard, twin = snapshot(module, training), _stand_in(module)
    twin.training = training
    before, dice = _contents(twin), (random.getstate(), torch.get_rng_state())
    try:
        with (
            torch.set_grad_enabled(grad),
            _children_in_mode(twin, grad),
            _noted_isinstance(module, guard),
            _noted_doubts() as doubts,
        ):
            graph = OwnForwardTracer().trace(twin)
        drew = dice[0] != random.getstate() or not torch.equal(dice[1], torch.get_rng_state())
    except Exception as error:
        line = str(error).strip().splitlines()
        raise NotProvedError(f"its forward can't be traced: {(line or ['?'])[0]}") from error
    finally:
        random.setstate(dice[0])
        torch.set_rng_state(dice[1])
    if doubts:
        raise NotProvedError(doubts[0])
    after = _contents(twin)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if changed:
        raise NotProvedError(f"its forward changes its attribute {changed[0]!r}")
    if drew:
        raise NotProvedError("its forward draws random numbers")
    guard.inputs = sum(node.op == "placeholder" for node in graph.nodes)
    return graph, guard
