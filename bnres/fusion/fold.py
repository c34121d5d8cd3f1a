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

    With ``scale = bn.weight / sqrt(var + eps)``, the convolution's filters become
    ``scale * filters``, and its bias becomes ``scale * (bias - mean) + bn.bias``. An `nn.Identity`
    replaces the batch norm, so the batch norm's keys are missing in the state dict. The copy is not
    fused, and `bnres.revert_sync_batchnorm` is applied to it. Nothing else changes.

    A folded model that was built from torch's layers can be loaded and exported without bnres. On a
    GPU a folded model reads and writes more memory than ``bnres.fuse(model).eval()``.

    The model is called with ``inputs`` and ``kwargs`` to find the convolution before each batch
    norm. If the model's forward later runs other operations, fold the model again. A convolution
    and a batch norm are folded only if:

    - They are a `torch.nn.Conv2d` and a torch batch norm with running statistics.
    - Each of the two modules is called once and has no hook.
    - Nothing else reads the convolution's output, or a parameter or buffer of the two modules.

    Args:
        model: any module in eval mode, fused or not. This module is not changed.
        inputs, kwargs: example arguments of the model.

    Raises:
        TypeError: if ``model`` is not a module, or if there are no example arguments.
        ValueError: if the model or one of its batch norms is in training mode, if Dynamo does not
            capture the model's forward as one graph, or if forward would run different operations
            after folding, for example because it tests whether a convolution has a bias.
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
        raise ValueError(
            "model can't be folded: its forward would run different operations afterwards"
        )
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
        raise ValueError(
            f"model can't be folded: torch.compile can't capture its forward in one graph: {line}"
        ) from error
    # torch never frees the backend `record`, and so never frees the list ``found``. pop takes the
    # graph out of the list, so that the graph can be freed.
    return found.pop() if found else (fx.Graph(), {})


def _pairs(
    graph: fx.Graph, tensors: dict[fx.Node, Any], model: nn.Module
) -> dict[fx.Node, tuple[str, str]]:
    """Returns the names of each convolution and batch norm to fold, by the batch norm's node."""
    modules, found = dict(model.named_modules(remove_duplicate=False)), {}
    for node in graph.nodes:
        call = norm_call(node)
        if call is None or call.conv is None or call.training:
            continue
        names = module_name(call.input), module_name(node)
        conv, bn = (modules.get(name) for name in names)
        if conv is None or bn is None or hooked(conv, bn):
            continue
        if type(conv) is not nn.Conv2d or type(bn) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
            continue
        # Each of the two calls must read its own module's parameters and buffers, and nothing else
        # may read them.
        read = (call.conv["weight"], call.state.input_bias, *call.state[:4])
        own = conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias
        if all(
            t is None if n is None else tensors.get(n) is t and only_user(n)
            for n, t in zip(read, own, strict=True)
        ):
            found[node] = names
    return found


def _called(graph: fx.Graph, without: Collection[fx.Node] = ()) -> list[Any]:
    """Returns the targets of the calls in a graph, except those of the nodes in ``without``."""
    return [n.target for n in graph.nodes if n.op.startswith("call") and n not in without]
