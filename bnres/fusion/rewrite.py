"""Puts fused operations into captured graphs."""

import operator
from typing import Any

import torch.nn.functional as F
from torch import fx

from bnres.functional import batch_norm_act, batch_norm_act_max_pool2d, conv2d_batch_norm_act
from bnres.fusion.frozen import as_batch_norm
from bnres.fusion.match import Match, Norm, find
from bnres.fusion.nodes import module_name, storage, writes
from bnres.fusion.report import Site

# What happened to a call of batch norm, and the nodes of the norm's tensors.
Found = tuple[Site, list[fx.Node]]


def fuse_graphs(module: fx.GraphModule) -> list[Found]:
    """Rewrites a captured graph and those nested in it; returns each batch norm's outcome."""
    graphs = [m for m in module.modules() if isinstance(m, fx.GraphModule)]
    return [found for graph in graphs for found in fuse_graph(graph)]


def fuse_graph(module: fx.GraphModule) -> list[Found]:
    """Rewrites one captured graph; returns each batch norm's outcome."""
    as_batch_norm(module)
    graph, fused = module.graph, []
    rows: list[Found] = []
    norms = [n for n in graph.nodes if n.op == "call_function" and n.target is F.batch_norm]
    replaced: set[fx.Node] = set()
    for node in norms:
        if node in replaced:
            continue
        order = {n: i for i, n in enumerate(graph.nodes)}
        match = find(node, order)
        if isinstance(match, str):
            site = Site(module_name(node), "-", match, fused=False)
            rows.append((site, node.all_input_nodes[1:]))
            continue
        for norm in match.norms:
            site = Site(module_name(norm.node), match.pattern, match.reason)
            rows.append((site, [n for n in norm.state[:4] if n is not None]))
        with graph.inserting_before(match.end):
            call = _call(graph, match)
        call.meta = dict(match.end.meta)
        match.end.replace_all_uses_with(call)
        for old in sorted(match.replaced, key=order.__getitem__, reverse=True):
            graph.erase_node(old)
        replaced |= match.replaced
        fused.append(call)
    for call in fused:
        _fork(graph, call)
    graph.lint()
    module.recompile()
    return rows


def _call(graph: fx.Graph, match: Match) -> fx.Node:
    """The call of the fused operation."""
    norm, second = match.norm, match.residual_norm
    act, act_kwargs = match.act or (None, {})
    options: dict[str, Any] = {"act": act, "act_kwargs": act_kwargs or None}
    options["training"] = norm.training
    if match.residual is not None:
        options["residual"] = match.residual
    if second is not None:
        options |= {"residual": second.input, "residual_norm": _take_bias(second)}
    if match.takes_conv:
        conv, state = norm.conv, norm.state._asdict()
        assert conv is not None
        del state["input_bias"]  # conv2d_batch_norm_act has conv_bias instead
        tensors = (conv.input, conv.weight, conv.bias)
        return graph.call_function(conv2d_batch_norm_act, tensors, options | conv.options | state)
    options |= _take_bias(norm)._asdict()
    if match.pool is not None:
        return graph.call_function(batch_norm_act_max_pool2d, (norm.input,), options | match.pool)
    return graph.call_function(batch_norm_act, (norm.input,), options)


def _take_bias(norm: Norm) -> Any:
    """A norm's state with the bias of the convolution before it, which is removed from that one."""
    conv = norm.conv
    if conv is None or conv.bias is None:
        return norm.state
    conv.node.args, conv.node.kwargs = (conv.input, conv.weight), conv.options
    return norm.state._replace(input_bias=conv.bias)


def _fork(graph: fx.Graph, call: fx.Node) -> None:
    """Gives each of two readers a separate tensor, so that our backward sums their gradients."""
    users, shared = list(call.users), storage(call)
    if len(users) != 2:
        return
    for node in graph.nodes:
        # A write through a view of one tensor would not reach the gradient of the other. The user
        # may write to an output of the graph.
        written = None if node.op == "output" else writes(node)
        touched = node.all_input_nodes if written is None else written
        if any(storage(n) == shared for n in touched):
            return
    call.update_kwarg("fork", True)
    with graph.inserting_after(call):
        second = graph.call_function(operator.getitem, (call, 1))
        first = graph.call_function(operator.getitem, (call, 0))
    for user, part in zip(users, (first, second), strict=True):
        part.meta = dict(call.meta)
        user.replace_input_with(call, part)
