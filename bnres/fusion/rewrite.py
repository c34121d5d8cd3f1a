"""Puts fused operations into captured graphs."""

import operator
from typing import Any

from torch import fx

from bnres.functional import conv2d_batch_norm_act, stem_conv2d
from bnres.fusion.frozen import as_batch_norm
from bnres.fusion.match import SIGNATURES, Match, find
from bnres.fusion.nodes import module_name, replace, stem_convolution, storage, writes
from bnres.fusion.report import Site

# A batch norm's row in the report, and the nodes of its parameters and buffers.
Found = tuple[Site, list[fx.Node]]


def fuse_graphs(module: fx.GraphModule) -> list[Found]:
    """Fuses a captured graph and its nested graphs. Returns a `Found` for each batch norm."""
    graphs = [m for m in module.modules() if isinstance(m, fx.GraphModule)]
    return [found for graph in graphs for found in fuse_graph(graph)]


def fuse_graph(module: fx.GraphModule) -> list[Found]:
    """Fuses a captured graph without its nested graphs. Returns a `Found` for each batch norm."""
    graph, rows = module.graph, []
    as_batch_norm(graph)
    calls: list[fx.Node] = []
    replaced: set[fx.Node] = set()
    norms = [graph.find_nodes(op="call_function", target=norm) for norm in SIGNATURES]
    for node in sorted(node for nodes in norms for node in nodes):
        if node in replaced:
            continue
        match = find(node)
        if isinstance(match, str):
            rows.append(_row(node, "-", match, fused=False))
            continue
        rows += [_row(norm.node, match.pattern, match.reason) for norm in match.norms]
        replaced |= match.replaced
        calls.append(replace(match.replaced, match.operation, *_arguments(match)))
    # `_fork` makes a call return two tensors that share memory. Nothing may write to this memory,
    # because autograd does not know that a write to one tensor also changes the other.
    written = _written(graph)
    for call in calls:
        if len(call.users) == 2 and storage(call) not in written:
            _fork(call)
    for node in graph.nodes:
        _use_stem_conv(node)
    graph.lint()
    module.recompile()
    return rows


def _row(node: fx.Node, pattern: str, reason: str, fused: bool = True) -> Found:
    return Site(module_name(node), pattern, reason, fused), node.all_input_nodes[1:]


def _arguments(match: Match) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of the fused call.

    Also removes the bias of a convolution that stays in the graph, because the fused call adds it.
    """
    norm = match.norms[0]
    options = match.options | norm.state._asdict()
    if norm.group:
        del options["input_bias"]
    if norm.conv is not None and match.operation is conv2d_batch_norm_act:
        del options["input_bias"]
        conv: dict[str, Any] = {"bias": None, **norm.conv}
        tensors = tuple(conv.pop(name) for name in ("input", "weight", "bias"))
        return tensors, options | conv
    for each in match.norms:
        if each.conv is not None and each.state.input_bias is not None:
            each.input.args, each.input.kwargs = (), {**each.conv, "bias": None}
    return (norm.input,), options


def _use_stem_conv(node: fx.Node) -> None:
    """Makes a node call `stem_conv2d` if this function can compute the node's convolution."""
    tensors = stem_convolution(node)
    if tensors is not None:
        node.op, node.target, node.args, node.kwargs = "call_function", stem_conv2d, tensors, {}


def _written(graph: fx.Graph) -> set[int | None]:
    """Returns identifiers of the memory to which a graph may write (see `storage`)."""
    found: set[int | None] = set()
    for node in graph.nodes:
        nodes = writes(node)
        found |= set(map(storage, node.all_input_nodes if nodes is None else nodes))
    return found


def _fork(call: fx.Node) -> None:
    """Makes a call return two tensors, one for each of its two users.

    Then the call's backward adds the gradients of the two tensors, so that autograd need not.
    """
    users = list(call.users)
    call.update_kwarg("fork", True)
    with call.graph.inserting_after(call):
        second = call.graph.call_function(operator.getitem, (call, 1))
        first = call.graph.call_function(operator.getitem, (call, 0))
    for user, part in zip(users, (first, second), strict=True):
        part.meta = dict(call.meta)
        user.replace_input_with(call, part)
