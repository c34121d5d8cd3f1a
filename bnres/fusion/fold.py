"""Folds batch norms into convolutions, for export and for the CPU."""

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
    """Returns a copy of a model in which batch norms are folded into the convolutions before them.

    The filters of each convolution are multiplied by ``weight / sqrt(var + eps)``, and its bias
    changes accordingly. A folded batch norm becomes an `nn.Identity` and loses its keys in the
    state dict. The copy is not fused, and batch norms that bnres has synchronised are local again.
    Nothing else changes. A folded model that was built from torch's layers can be loaded and
    exported without bnres. On a GPU a folded model reads and writes more memory than
    ``bnres.fuse(model).eval()``.

    The model is called with ``inputs`` and ``kwargs`` to find the convolution before each batch
    norm. If a later change makes the model's forward run other operations, fold the model again.
    Only a `torch.nn.Conv2d` followed by a torch batch norm with running statistics is folded.
    Such a pair is not folded if one of the two modules is called more than once or has a hook. It
    is also not folded if anything else reads the convolution's output, or a parameter or buffer of
    the two modules.

    Args:
        model: any module in eval mode, fused or not. It is not changed.
        inputs, kwargs: example arguments of the model.

    Raises:
        TypeError: if ``model`` is not a module, or if there are no example arguments.
        ValueError: if the model or one of its batch norms is in training mode, if Dynamo does not
            capture the model's forward as one graph, or if the folded model's forward would run
            other operations, for example because it tests whether a convolution has a bias.
    """
    folded = revert_sync_batchnorm(unfuse(model))
    if not (inputs or kwargs):
        raise TypeError("fold needs example inputs of the model: fold(model, *inputs)")
    for name, module in folded.named_modules():
        if module.training and (not name or is_norm(module)):
            raise ValueError(
                f"model must be in eval mode to be folded, but {name or 'it'} is in training mode: "
                "call model.eval() first"
            )
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
    """Returns the graph of a call of the model, and the tensor of each placeholder."""
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
            model(*inputs, **kwargs)  # if this call fails, its error is raised instead
        line = str(error).splitlines()[0]
        raise ValueError(f"model can't be folded: its forward is not one graph: {line}") from error
    # Torch keeps every backend in memory, and therefore `record` and this list too. The graph is
    # removed from the list, so that it can be freed.
    return found.pop() if found else (fx.Graph(), {})


def _pairs(
    graph: fx.Graph, tensors: dict[fx.Node, Any], model: nn.Module
) -> dict[fx.Node, tuple[str, str]]:
    """Returns the node of each batch norm to fold, with the names of two modules.

    The first name is that of the convolution, and the second is that of the batch norm.
    """
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
    """Returns the targets of the calls in a graph, in order."""
    return [n.target for n in graph.nodes if n.op.startswith("call") and n not in without]
