"""Recognises which operation a node of a captured graph runs, and to which tensors it writes."""

import inspect
import operator
import re
from typing import Any

import torch.nn.functional as F
from torch import fx

from bnres.functional import (
    batch_norm_act,
    batch_norm_act_max_pool2d,
    conv2d_batch_norm_act,
    sync_batch_norm_act,
)
from bnres.fusion.dynamo import (
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    equal_shapes,
    tree_leaves,
)
from bnres.kernels.torch_internals import FakeTensor
from bnres.operations.batch_norm_act_max_pool import is_stem
from bnres.operations.stem_conv import KERNEL, PADDING, STRIDE
from bnres.operations.sync_batch_norm_act import sync_batch_norm

ADDITIONS = ("add", "iadd")
POOLING = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
# The names of each activation's arguments after the input.
ACTIVATIONS = {
    "relu": ("inplace",),
    "relu6": ("inplace",),
    "leaky_relu": ("negative_slope", "inplace"),
    "hardswish": ("inplace",),
    "silu": ("inplace",),
    "gelu": ("approximate",),
    "sigmoid": (),
    "hardtanh": ("min_val", "max_val", "inplace"),
    "clamp": ("min", "max"),
    "clip": ("min", "max"),
}
RELU6 = ({"min_val": 0, "max_val": 6}, {"min": 0, "max": 6})

# Functions and methods with these names write to their first argument, for example add_ and iadd.
IN_PLACE = re.compile(
    r".*[^_]_|_*(setitem|i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift))_*"
)
# These functions write only to running statistics and counters. Any other function with batch_norm
# or instance_norm in its name is assumed to write to all of its arguments.
NORMS = (
    F.batch_norm, F.instance_norm, batch_norm_act, batch_norm_act_max_pool2d, conv2d_batch_norm_act,
    sync_batch_norm, sync_batch_norm_act,
)  # fmt: skip
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
NORMS_IN_PLACE = re.compile("(batch|instance)_norm")
# A function of these Python modules writes to a tensor only if its name or an argument says so,
# for example add_ or inplace=True.
KNOWN = ("torch", "_operator", "operator", "math", "builtins")
OPERATORS: Any = (OpOverload, OpOverloadPacket)


def value(node: Any) -> FakeTensor | None:
    """Returns the fake tensor of a node: the shape and dtype of the node's result, without data.

    The result is None if ``node`` is not a node or does not compute a tensor.
    """
    found = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return found if isinstance(found, FakeTensor) else None


def storage(node: fx.Node) -> int | None:
    """Returns an identifier of the memory of a node's tensor, or None if the node has no tensor.

    Tensors that share memory have the same identifier.
    """
    found = value(node)
    return None if found is None else found.untyped_storage()._cdata


def alike(a: Any, b: Any) -> bool:
    """Whether the tensors of two nodes have the same dtype, and the same shape in every call."""
    x, y = value(a), value(b)
    if x is None or y is None or x.dtype != y.dtype:
        return False
    return equal_shapes(x.shape, y.shape)


def only_user(node: fx.Node) -> fx.Node | None:
    """Returns the node that reads ``node`` if there is exactly one, otherwise None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def dies_in(node: fx.Node, user: fx.Node) -> bool:
    """Whether the graph allocated the memory of ``node``, and no node after ``user`` reads it."""
    return all(
        other.op.startswith("call")
        # The outputs of a call with several outputs may share memory.
        and not (other.target is operator.getitem and value(other.args[0]) is None)
        and all(reader <= user and value(reader) is not None for reader in other.users)
        for other in node.graph.nodes
        if other < user and storage(other) == storage(node)
    )


def module_name(node: fx.Node) -> str:
    """Returns the qualified name of the module whose forward called a node's operation.

    If the module is unknown, the result is the name of the node.
    """
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return re.sub(r"^L\['\w+'\](\.__self__)?\.?", "", stack[-1][0]) if stack else node.name


def torch_name(node: fx.Node | None) -> str:
    """Returns the name of the method or function that a node calls.

    The result is empty if the node calls nothing, an operator of ``torch.ops``, or a function from
    neither torch nor Python.
    """
    if node is None or node.op not in ("call_function", "call_method"):
        return ""
    if isinstance(node.target, str):
        return node.target
    home = (getattr(node.target, "__module__", None) or "builtins").split(".")[0]
    others = (*OPERATORS, HigherOrderOperator)
    known = home in KNOWN and not isinstance(node.target, others)
    return getattr(node.target, "__name__", "") if known else ""


def arguments(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any] | None:
    """Returns the arguments of a call by name, or None if one of them is not in ``names``.

    ``names`` are the function's argument names in order.
    """
    found = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return found if len(node.args) <= len(names) and set(found) <= set(names) else None


def constants(node: Any, names: tuple[str, ...]) -> dict[str, Any] | None:
    """Returns the arguments of a call by name, without the first argument ``input``.

    ``names`` are the names that these arguments may have, in order. The result is None if one of
    them has another name or is a node.
    """
    found = arguments(node, ("input", *names)) or {}
    if [name for name, v in found.items() if isinstance(v, fx.Node)] != ["input"]:
        return None
    del found["input"]
    return found


def addition(node: fx.Node) -> tuple[Any, Any] | None:
    """Returns the two terms that a node adds, or None if the node is not an addition."""
    added = torch_name(node).rstrip("_") in ADDITIONS
    found = arguments(node, ("input", "other")) if added else None
    return None if found is None else (found["input"], found["other"])


def activation(node: fx.Node | None) -> tuple[str, dict[str, Any] | None] | None:
    """Returns the name and options of the activation that a node applies.

    The result is None if the node applies no activation that bnres supports.
    """
    name = torch_name(node).rstrip("_")
    options = constants(node, ACTIVATIONS[name]) if name in ACTIVATIONS else None
    if options is None:
        return None
    options.pop("inplace", None)
    if name not in ("hardtanh", "clamp", "clip"):
        return name, options or None
    # At the bounds, the derivative of clamp is 1 and that of relu6 is 0. So a clamp is a relu6 only
    # if no gradients are needed.
    same = name == "hardtanh" or not getattr(value(node), "requires_grad", True)
    return ("relu6", None) if same and options in RELU6 else None


def pooling(node: fx.Node | None) -> dict[str, Any] | None:
    """Returns the options of a node that is the max-pool of a ResNet's stem, otherwise None."""
    options = constants(node, POOLING) if torch_name(node) == "max_pool2d" else None
    if options is None or options.pop("return_indices", False) or not is_stem(**options):
        return None
    return options


def convolution(node: fx.Node) -> dict[str, Any] | None:
    """Returns the arguments of a node that is a 2-D convolution of a 4-D input, otherwise None."""
    found = arguments(node, CONVOLUTION) if torch_name(node) == "conv2d" else None
    x = None if found is None else value(found.get("input"))
    return found if x is not None and x.dim() == 4 else None


def stem_convolution(node: fx.Node) -> tuple[Any, ...] | None:
    """Returns the input, weight and bias of a convolution that `stem_conv2d` can compute.

    The result is None for any other node.
    """
    found = convolution(node)
    weight = None if found is None else value(found["weight"])
    if found is None or weight is None or weight.shape[2:] != (KERNEL, KERNEL):
        return None
    tensors = found.pop("input"), found.pop("weight"), found.pop("bias", None)
    options = {name: tree_leaves(given) for name, given in found.items()}
    wanted = {"stride": {STRIDE}, "padding": {PADDING}, "dilation": {1}, "groups": {1}}
    same = all(set(options.get(name, [1])) == values for name, values in wanted.items())
    return tensors if same else None


def _statistics(node: fx.Node) -> list[fx.Node]:
    """Returns the nodes of the running statistics and counters in a batch norm's arguments.

    The argument ``residual_norm`` is a second batch norm, which has its own.
    """
    first = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments  # type: ignore[arg-type]
    second = first.get("residual_norm")
    norms = [first] if second is None else [first, second._asdict()]
    return [norm[k] for norm in norms for k in STATISTICS if isinstance(norm.get(k), fx.Node)]


def writes(node: fx.Node) -> list[fx.Node] | None:
    """Returns the nodes to whose tensors ``node`` may write, or None if these nodes are unknown."""
    if node.op in ("placeholder", "get_attr"):
        return []
    target: Any = node.target
    if target in NORMS:
        return _statistics(node)
    if NORMS_IN_PLACE.search(getattr(target, "__name__", "")):
        return node.all_input_nodes
    if isinstance(target, OPERATORS):
        packet = isinstance(target, OpOverloadPacket)
        overloads = [getattr(target, name) for name in target.overloads()] if packet else [target]
        return node.all_input_nodes if any(o._schema.is_mutable for o in overloads) else []
    name = torch_name(node)
    given = tree_leaves([*node.args[:1], node.kwargs.get("input"), node.kwargs.get("out")])
    first = [n for n in given if isinstance(n, fx.Node)]
    if IN_PLACE.fullmatch(name):
        return first
    # An unknown function may write to any tensor. A function without a result may have a side
    # effect, such as disabling gradients.
    if node.op != "call_method" and (not name or node.meta.get("example_value") is None):
        return None
    asked = node.kwargs.get("inplace") or any(a is True for a in node.args)
    return first if asked or "out" in node.kwargs else []


def replace(nodes: set[fx.Node], target: Any, args: tuple[Any, ...], kwargs: Any) -> fx.Node:
    """Replaces nodes with one call at the position of the last node. Returns the call."""
    end = max(nodes)
    with end.graph.inserting_before(end):
        call = end.graph.call_function(target, args, kwargs)
    call.meta = dict(end.meta)
    end.replace_all_uses_with(call)
    for node in sorted(nodes, reverse=True):
        end.graph.erase_node(node)
    return call
