"""Folds batch norms into convolutions, for export and for the CPU."""

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bnres.fusion.backend import unfuse
from bnres.fusion.dynamo import compiled, not_captured
from bnres.fusion.explain import is_norm
from bnres.fusion.match import norm_call
from bnres.fusion.nodes import module_name, only_user
from bnres.nn.hooks import hooked
from bnres.nn.sync import revert_sync_batchnorm


def fold(model: nn.Module, *inputs: Any, **kwargs: Any) -> nn.Module:
    """A copy of a model in which batch norms are folded into the convolutions before them.

    ``weight / sqrt(var + eps)`` scales the convolution's filters. A folded batch norm becomes an
    `nn.Identity`, without its keys; nothing else changes. The copy of a stock model loads and
    exports without bnres. On a GPU ``bnres.fuse(model).eval()`` moves less memory.

    The graph of a call with ``inputs`` shows which convolution each batch norm follows. The result
    is valid as long as the model's forward runs the same operations: fold again after changing its
    configuration. A batch norm is not folded if a tensor of the two modules is used elsewhere, if
    one of them is called more than once or has a hook, or if one is not of torch's own classes.

    Args:
        model: any module in eval mode, fused or not; it is not changed.
        inputs, kwargs: example arguments of the model. Without any, nothing is folded.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if the model or one of its batch norms is in training mode, if Dynamo does not
            capture its forward as one graph, or if its forward changes when batch norms are folded.
    """
    folded = revert_sync_batchnorm(unfuse(model))
    for name, module in folded.named_modules():
        if module.training and (not name or is_norm(module)):
            raise ValueError(
                f"model must be in eval mode to be folded, but {name or 'it'} is in training mode: "
                "call model.eval() first"
            )
    if not (inputs or kwargs):
        warnings.warn(
            "fold was called without an example of the model's inputs: nothing is folded",
            stacklevel=2,
        )
        return folded
    graph, tensors = _capture(folded, inputs, kwargs)
    pairs = _pairs(graph, tensors, folded)
    for conv, norm in pairs.values():
        merged = fuse_conv_bn_eval(folded.get_submodule(conv), folded.get_submodule(norm))  # type: ignore[arg-type, type-var]
        folded.set_submodule(conv, merged)
        folded.set_submodule(norm, nn.Identity())
    after, _ = _capture(folded, inputs, kwargs)
    if _called(after) != _called(graph, without=pairs):
        raise ValueError("model can't be folded: its forward depends on its batch norms or biases")
    return folded


def _capture(
    model: nn.Module, inputs: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[fx.Graph, dict[fx.Node, Any]]:
    """The graph of a call of the model, and the tensor of each placeholder."""
    found: list[tuple[fx.Graph, dict[fx.Node, Any]]] = []

    def record(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        placeholders = module.graph.find_nodes(op="placeholder")
        found.append((module.graph, dict(zip(placeholders, example_inputs, strict=True))))
        return module.forward

    try:
        with torch.no_grad():
            compiled(model, record, fullgraph=True)(*inputs, **kwargs)
    except not_captured() as error:
        with torch.no_grad():
            model(*inputs, **kwargs)  # raises the model's own error, if it has one
        line = str(error).splitlines()[0]
        raise ValueError(f"model can't be folded: its forward is not one graph: {line}") from error
    # Popped, because torch keeps every backend, so `record` and its list stay in memory.
    return found.pop() if found else (fx.Graph(), {})


def _pairs(
    graph: fx.Graph, tensors: dict[fx.Node, Any], model: nn.Module
) -> dict[fx.Node, tuple[str, str]]:
    """The names of the convolution and batch norm to fold, by the node of the batch norm."""
    modules, found = dict(model.named_modules(remove_duplicate=False)), {}
    for node in graph.nodes:
        call = norm_call(node)
        if call is None or call.conv is None or call.training:
            continue
        state, weight = call.state, call.conv["weight"]
        read = (weight, state.input_bias, *state[:4])
        names = module_name(call.input), module_name(node)
        conv, bn = (modules.get(name) for name in names)
        if (
            type(conv) is nn.Conv2d
            and type(bn) in (nn.BatchNorm2d, nn.SyncBatchNorm)
            and not hooked(conv, bn)
            and all(n is None or (n in tensors and only_user(n)) for n in read)
            and tensors[weight] is conv.weight
            and tensors[state.running_mean] is bn.running_mean  # type: ignore[union-attr]
        ):
            found[node] = names
    return found


def _called(graph: fx.Graph, without: Collection[fx.Node] = ()) -> list[Any]:
    """The targets of a graph's calls, in order."""
    return [n.target for n in graph.nodes if n.op.startswith("call") and n not in without]
