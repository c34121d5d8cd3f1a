"""Recognises frozen batch norms that are written as plain arithmetic.

A frozen batch norm is a batch norm whose statistics are fixed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.passes.utils.matcher_utils import SubgraphMatcher

from bnres.fusion.match import obstacle
from bnres.fusion.nodes import alike, replace, value


def _torchvision(x: Any, mean: Any, var: Any, weight: Any, bias: Any) -> Any:
    """The forward of FrozenBatchNorm2d in torchvision and in transformers."""
    w, b = weight.reshape(1, -1, 1, 1), bias.reshape(1, -1, 1, 1)
    v, m = var.reshape(1, -1, 1, 1), mean.reshape(1, -1, 1, 1)
    scale = w * (v + 1e-5).rsqrt()
    return x * scale + (b - m * scale)


def _detectron2(x: Any, mean: Any, var: Any, weight: Any, bias: Any) -> Any:
    """The forward of detectron2's FrozenBatchNorm2d if x needs a gradient."""
    scale = weight * (var + 1e-5).rsqrt()
    shift = (bias - mean * scale).reshape(1, -1, 1, 1)
    return x * scale.reshape(1, -1, 1, 1).to(torch.float32) + shift.to(torch.float32)


# With ignore_literals, a model may have another eps than the pattern.
MATCHERS = [
    SubgraphMatcher(fx.symbolic_trace(pattern).graph, ignore_literals=True)
    for pattern in (_torchvision, _detectron2)
]


def as_batch_norm(graph: fx.Graph) -> None:
    """Replaces the arithmetic of frozen batch norms in a captured graph by `F.batch_norm`."""
    for matcher in MATCHERS:
        for match in matcher.match(graph):
            found: Any = {n.name: m for n, m in match.nodes_map.items() if n.op != "output"}
            vectors = [found.pop(name) for name in ("mean", "var", "weight", "bias")]
            del found["x"]
            own, eps = set(found.values()), found["rsqrt"].args[0].args[1]
            (end,) = match.returning_nodes
            # x is not taken from ``match``, because an earlier replacement may have removed it.
            x: Any = end.all_input_nodes[0].args[0]
            if _is_batch_norm(x, eps, end, vectors) and not obstacle(own, set()):
                replace(own, F.batch_norm, (x, *vectors, False, 0.0, eps), {})


def _is_batch_norm(x: fx.Node, eps: Any, end: Any, vectors: list[fx.Node]) -> bool:
    """Whether the arithmetic whose result is the node ``end`` computes a batch norm of ``x``.

    The matcher has compared only the operations, so shapes and dtypes are checked here.
    """
    product, shift = end.args
    nodes = (end, product.args[1], shift, *vectors)
    shapes: list[Any] = [getattr(value(n), "shape", None) for n in nodes]
    if not isinstance(eps, float) or not alike(x, end) or len(shapes[0]) != 4:
        return False
    channels = shapes[0][1]
    # F.batch_norm computes no gradients of the mean and the variance, so neither may need one.
    fixed = not any(getattr(value(n), "requires_grad", True) for n in vectors[:2])
    return shapes[1:] == [(1, channels, 1, 1)] * 2 + [(channels,)] * 4 and fixed
