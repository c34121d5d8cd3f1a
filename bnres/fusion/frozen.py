"""Recognises batch norm with fixed statistics that is written as arithmetic.

The patterns match any eps, shape and dtype; `_is_batch_norm` then checks those of a match.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.passes.utils.matcher_utils import InternalMatch
from torch.fx.subgraph_rewriter import replace_pattern_with_filters

from bnres.fusion.match import obstacle
from bnres.fusion.nodes import alike, value

VECTORS = ("mean", "var", "weight", "bias")


def _torchvision(x: Any, mean: Any, var: Any, weight: Any, bias: Any) -> Any:
    """The forward of FrozenBatchNorm2d in torchvision and in transformers."""
    w, b = weight.reshape(1, -1, 1, 1), bias.reshape(1, -1, 1, 1)
    v, m = var.reshape(1, -1, 1, 1), mean.reshape(1, -1, 1, 1)
    scale = w * (v + 1e-5).rsqrt()
    return x * scale + (b - m * scale)


def _detectron2(x: Any, mean: Any, var: Any, weight: Any, bias: Any) -> Any:
    """The forward of detectron2's FrozenBatchNorm2d for an x of any dtype that needs a gradient."""
    scale = weight * (var + 1e-5).rsqrt()
    shift = (bias - mean * scale).reshape(1, -1, 1, 1)
    return x * scale.reshape(1, -1, 1, 1).to(torch.float32) + shift.to(torch.float32)


def as_batch_norm(module: fx.GraphModule) -> None:
    """Replaces such arithmetic in a captured graph with calls of `F.batch_norm`."""
    for pattern in (_torchvision, _detectron2):
        found = replace_pattern_with_filters(
            module, pattern, replacement_callback=_batch_norm, match_filters=[_is_batch_norm],
            ignore_literals=True,
        )  # fmt: skip
        for match in found:
            (call,) = match.replacements
            call.meta = dict(match.nodes_map[match.anchor].meta)


def _named(match: InternalMatch) -> dict[str, fx.Node]:
    """The nodes of a match by their names in the pattern."""
    return {node.name: found for node, found in match.nodes_map.items()}


def _eps(match: InternalMatch) -> Any:
    (total,) = _named(match)["rsqrt"].all_input_nodes
    return total.args[1]


def _is_batch_norm(match: InternalMatch, graph: fx.Graph, pattern: fx.Graph) -> bool:
    """Whether a match has a batch norm's shapes and dtypes, and the call can be put at its end."""
    named = _named(match)
    end: Any = match.returning_nodes[0]
    product, shift = end.args
    x, scale = value(named["x"]), product.args[1]
    if (
        x is None
        or x.dim() != 4
        or not alike(named["x"], end)
        or not isinstance(_eps(match), float)
    ):
        return False
    shapes = [getattr(value(named[name]), "shape", None) for name in VECTORS]
    shapes_here = [getattr(value(n), "shape", None) for n in (scale, shift)]
    if shapes != [(x.shape[1],)] * 4 or shapes_here != [(1, x.shape[1], 1, 1)] * 2:
        return False
    if any(getattr(value(named[name]), "requires_grad", True) for name in ("mean", "var")):
        return False  # F.batch_norm gives them no gradients
    inputs = {named[name] for name in ("x", *VECTORS)}
    own = {n for n in match.nodes_map.values() if n not in inputs and n.op != "output"}
    order = {n: i for i, n in enumerate(graph.nodes)}
    # torch puts the call before the first node that reads it.
    first = min(end.users, key=order.__getitem__, default=end)
    return not obstacle(own | {first}, set(), order)


def _batch_norm(match: InternalMatch, graph: fx.Graph, pattern: fx.Graph) -> fx.Graph:
    new = fx.Graph()
    inputs = [new.placeholder(node.name) for node in pattern.nodes if node.op == "placeholder"]
    new.output(new.call_function(F.batch_norm, (*inputs, False, 0.0, _eps(match))))
    return new
