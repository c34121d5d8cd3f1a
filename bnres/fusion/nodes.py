"""Tells what the nodes of a captured graph are and which tensors they write to."""

import inspect
import operator
import re
from itertools import takewhile
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from bnres.functional import batch_norm_act, batch_norm_act_max_pool2d, conv2d_batch_norm_act

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
# The activation of each function, and the names of the arguments after its input.
ACTIVATIONS: dict[Any, tuple[str, tuple[str, ...]]] = {
    F.relu: ("relu", ("inplace",)),
    F.relu_: ("relu", ()),
    torch.relu: ("relu", ()),
    torch.relu_: ("relu", ()),
    "relu": ("relu", ()),
    "relu_": ("relu", ()),
    F.relu6: ("relu6", ("inplace",)),
    F.leaky_relu: ("leaky_relu", ("negative_slope", "inplace")),
    F.leaky_relu_: ("leaky_relu", ("negative_slope",)),
    F.hardswish: ("hardswish", ("inplace",)),
    F.silu: ("silu", ("inplace",)),
    F.gelu: ("gelu", ("approximate",)),
    F.sigmoid: ("sigmoid", ()),
    torch.sigmoid: ("sigmoid", ()),
    torch.sigmoid_: ("sigmoid", ()),
    "sigmoid": ("sigmoid", ()),
    "sigmoid_": ("sigmoid", ()),
}
HARDTANHS = (F.hardtanh, F.hardtanh_)
CLAMPS = (torch.clamp, torch.clamp_, torch.clip, torch.clip_, "clamp", "clamp_", "clip", "clip_")
POOLINGS = (F.max_pool2d, torch.max_pool2d)
POOLING = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
BATCH_NORM = inspect.signature(F.batch_norm)

IN_PLACE = re.compile(
    r".*[^_]_|_*i(add|sub|mul|truediv|floordiv|matmul|pow|and|or|xor)_*|setitem|__set.*"
)
# These write only to running statistics. Other norms of torch may write to any of their arguments.
NORMS = (F.batch_norm, F.instance_norm)
OPERATIONS = (batch_norm_act, batch_norm_act_max_pool2d, conv2d_batch_norm_act)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
NORMS_IN_PLACE = re.compile("(batch|instance)_norm")
# Python modules whose functions write to a tensor only if their name or an argument says so.
KNOWN = ("torch", "_operator", "operator", "math", "builtins")


def value(node: Any) -> FakeTensor | None:
    """The fake tensor that Dynamo computed for a node; None for anything else."""
    found = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return found if isinstance(found, FakeTensor) else None


def storage(node: fx.Node) -> int | None:
    """An identifier of the memory of a node's tensor, equal for tensors that share it."""
    found = value(node)
    return None if found is None else found.untyped_storage()._cdata


def alike(a: Any, b: Any) -> bool:
    """Whether two nodes are tensors of the same shape and dtype, whatever the dynamic sizes are."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy

    x, y = value(a), value(b)
    return (
        x is not None
        and y is not None
        and (x.dtype, x.dim()) == (y.dtype, y.dim())
        and all(statically_known_true(m == n) for m, n in zip(x.shape, y.shape, strict=True))
    )


def only_user(node: fx.Node) -> fx.Node | None:
    """The node that reads ``node``, if there is exactly one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def dies_in(node: fx.Node, user: fx.Node) -> bool:
    """Whether ``node``'s memory was allocated in this graph and nothing after ``user`` reads it."""
    before = takewhile(lambda n: n is not user, node.graph.nodes)
    return all(
        other.op.startswith("call")
        and not _is_item(other)
        and all(reader <= user and value(reader) is not None for reader in other.users)
        for other in before
        if storage(other) == storage(node)
    )


def _is_item(node: fx.Node) -> bool:
    """Whether a node is one of several results of a call, which may share memory."""
    return node.target is operator.getitem and value(node.args[0]) is None


def module_name(node: fx.Node) -> str:
    """The name, as in `named_modules`, of the module whose forward made a node."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return re.sub(r"^L\['\w+'\](\.__self__)?\.?", "", stack[-1][0]) if stack else node.name


def calls(node: fx.Node, targets: Any) -> bool:
    """Whether a node calls one of some functions and methods."""
    return node.op in ("call_function", "call_method") and node.target in targets


def arguments(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any] | None:
    """A call's arguments by name; None if it has arguments with other names."""
    found = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return found if len(node.args) <= len(names) and set(found) <= set(names) else None


def constants(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any] | None:
    """The arguments after a call's input by name; None if there are others, or one is a node."""
    found = arguments(node, ("input", *names))
    if found is None or not isinstance(found.pop("input", None), fx.Node):
        return None
    return None if any(isinstance(v, fx.Node) for v in found.values()) else found


def addition(node: fx.Node) -> tuple[Any, Any] | None:
    """The two terms that a node adds."""
    found = arguments(node, ("input", "other")) if calls(node, ADDITIONS) else None
    return None if found is None else (found["input"], found["other"])


def activation(node: fx.Node) -> tuple[str, dict[str, Any]] | None:
    """The name and the options of the activation that a node applies."""
    if calls(node, HARDTANHS):
        found = constants(node, ("min_val", "max_val", "inplace")) or {}
        return ("relu6", {}) if (found.get("min_val"), found.get("max_val")) == (0, 6) else None
    if calls(node, CLAMPS):
        # With gradients a clamp is not relu6: at its bounds its gradient is 1, that of relu6 is 0.
        found = constants(node, ("min", "max")) or {}
        bounds = found.get("min"), found.get("max")
        needs_grad = getattr(value(node), "requires_grad", True)
        return ("relu6", {}) if bounds == (0, 6) and not needs_grad else None
    if not calls(node, ACTIVATIONS):
        return None
    name, names = ACTIVATIONS[node.target]
    options = constants(node, names)
    if options is None:
        return None
    options.pop("inplace", None)
    return name, options


def pooling(node: fx.Node) -> dict[str, Any] | None:
    """The options of the max-pool that a node applies."""
    options = constants(node, POOLING) if calls(node, POOLINGS) else None
    return None if options is None or options.pop("return_indices", False) else options


class Convolution(NamedTuple):
    """A call of a 2-D convolution; ``options`` are its stride, padding, dilation and groups."""

    node: fx.Node
    input: Any
    weight: Any
    bias: Any
    options: dict[str, Any]


def convolution(node: fx.Node) -> Convolution | None:
    """The 2-D convolution of a batch of images that a node calls."""
    found = arguments(node, CONVOLUTION) if calls(node, (F.conv2d,)) else None
    x = None if found is None else value(found.get("input"))
    if found is None or x is None or x.dim() != 4:
        return None
    return Convolution(
        node, found.pop("input"), found.pop("weight"), found.pop("bias", None), found
    )


def _statistics(node: fx.Node) -> list[fx.Node]:
    """The running statistics and counters of a call with one or two norms."""
    given = [inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments]  # type: ignore[arg-type]
    second = given[0].get("residual_norm")
    given += [] if second is None else [second._asdict()]
    found = [norm.get(name) for norm in given for name in STATISTICS]
    return [n for n in found if isinstance(n, fx.Node)]


def writes(node: fx.Node) -> list[fx.Node] | None:
    """The nodes whose tensors a node may write to; None if that is not known."""
    if node.op in ("placeholder", "get_attr", "output"):
        return []
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return node.all_input_nodes if target._schema.is_mutable else []
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if target in NORMS or target in OPERATIONS:
        return _statistics(node)
    if NORMS_IN_PLACE.search(name):
        return node.all_input_nodes
    given = pytree.tree_leaves([*node.args[:1], node.kwargs.get("input"), node.kwargs.get("out")])
    first = [n for n in given if isinstance(n, fx.Node)]
    if IN_PLACE.fullmatch(name):
        return first
    home = (getattr(target, "__module__", None) or "builtins").split(".")[0]
    known = home in KNOWN and not isinstance(target, torch._ops.HigherOrderOperator)
    if node.op != "call_method" and not (known and node.meta.get("example_value") is not None):
        return None  # not torch's, or called for a side effect such as switching gradients off
    asked = node.kwargs.get("inplace") or any(a is True for a in node.args)
    return first if asked or "out" in node.kwargs else []
