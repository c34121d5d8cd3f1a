"""What the nodes of a traced forward are: batch norms, convolutions, additions, activations."""

import operator
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from bnres.activations import CLASSES
from bnres.fusion.calls import NORMS, Windows

ADDITIONS = {operator.add: False, operator.iadd: True, torch.add: False, "add": False, "add_": True}
FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    "relu": "relu",
    "relu_": "relu",
    F.relu6: "relu6",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.hardswish: "hardswish",
    F.silu: "silu",
    F.gelu: "gelu",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
}
POOLINGS = (F.max_pool2d, torch.max_pool2d)
IN_PLACE_OPERATORS = frozenset(
    ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imatmul", "ipow", "iand", "ior", "ixor")
)
OPTIONS = {"leaky_relu": ("negative_slope", "inplace"), "gelu": ("approximate",)}


@dataclass(frozen=True)
class Addition:
    """left + right, or left += right."""

    left: fx.Node
    right: fx.Node
    in_place: bool


def child(root: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that a node calls."""
    if node.op != "call_module":
        return None
    return root.get_submodule(str(node.target))


def only_input(node: fx.Node) -> fx.Node | None:
    """The input of a call of a module with one positional argument."""
    if len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return None


def is_norm(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node calls a batch norm that can be fused."""
    return type(child(root, node)) in NORMS and only_input(node) is not None


def is_conv(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node calls torch's own 2-D convolution."""
    return type(child(root, node)) is nn.Conv2d and only_input(node) is not None


def ends_in_norm(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node calls a Sequential whose last module, and no other, is a batch norm to fuse."""
    module = child(root, node)
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and [i for i, m in enumerate(module, 1) if type(m) in NORMS] == [len(module)]
        and only_input(node) is not None
    )


def addition(node: fx.Node) -> Addition | None:
    """The addition of two tensors that a node is."""
    if node.op not in ("call_function", "call_method") or node.target not in ADDITIONS:
        return None
    if len(node.args) != 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    left, right = node.args
    return Addition(left, right, ADDITIONS[node.target])  # type: ignore[arg-type]


def activation_of(root: nn.Module, node: fx.Node) -> tuple[str, dict[str, Any]] | nn.Module | None:
    """The activation that a node is: a module, or a name and options."""
    module = child(root, node)
    if module is not None:
        fits = type(module) in CLASSES and not isinstance(module, nn.Identity)
        return module if fits and only_input(node) is not None else None
    if node.op not in ("call_function", "call_method") or node.target not in FUNCTIONS:
        return None
    name = FUNCTIONS[node.target]
    names = OPTIONS.get(name, ("inplace",))
    if len(node.args) > 1 + len(names) or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    options = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    options.pop("inplace", None)
    if set(options) - set(names) or any(isinstance(v, fx.Node) for v in options.values()):
        return None
    return name, options


def pooling_of(root: nn.Module, node: fx.Node) -> tuple[Any, ...] | nn.MaxPool2d | None:
    """The max-pool that a node is: a module, or the arguments of the function."""
    module = child(root, node)
    if type(module) is nn.MaxPool2d and only_input(node) is not None:
        return None if module.return_indices else module
    if node.op != "call_function" or node.target not in POOLINGS:
        return None
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    options: dict[str, Any] = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    if options.pop("return_indices", False) or set(options) - set(names):
        return None
    if any(isinstance(v, fx.Node) for v in options.values()) or not node.args:
        return None
    return astuple(Windows(**options))


def writes_in_place(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node changes a tensor that others may hold."""
    module = child(root, node)
    if module is not None:
        return any(getattr(m, "inplace", False) for m in module.modules())
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_method" or node.op == "call_function":
        in_place = name.endswith("_") and not name.endswith("__")
        by_operator = node.op == "call_function" and name in IN_PLACE_OPERATORS
        # Of options by position, a True may be inplace.
        asked = node.kwargs.get("inplace") or "out" in node.kwargs or True in node.args
        return in_place or by_operator or bool(asked)
    return False
