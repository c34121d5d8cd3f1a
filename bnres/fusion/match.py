"""Finds the batch norms in a captured graph and the operations that can be fused with each."""

from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import fx

from bnres.fusion.nodes import (
    BATCH_NORM,
    Convolution,
    activation,
    addition,
    alike,
    convolution,
    dies_in,
    only_user,
    pooling,
    storage,
    value,
    writes,
)
from bnres.kernels.dtypes import SUPPORTED_DTYPES
from bnres.operations.norms import BatchNormState


@dataclass
class Norm:
    """A call of batch norm.

    Attributes:
        node: the call.
        input: the node that it normalises.
        state: its tensors, as nodes, and options, in a `BatchNormState`.
        training: whether it normalises with the statistics of the batch.
        count: the node that counts the batch, or None.
        conv: the convolution whose output only this batch norm reads, or None.
    """

    node: fx.Node
    input: fx.Node
    state: Any
    training: bool
    count: fx.Node | None
    conv: Convolution | None

    @property
    def buffers(self) -> set[int | None]:
        """The storages that the call writes to."""
        written = (self.state.running_mean, self.state.running_var, self.state.num_batches_tracked)
        return {storage(n) for n in written if isinstance(n, fx.Node)}


@dataclass
class Match:
    """Nodes that one fused call replaces; the call is put at the last of ``nodes``."""

    norm: Norm
    nodes: list[fx.Node]
    residual: fx.Node | None = None
    residual_norm: Norm | None = None
    act: tuple[str, dict[str, Any]] | None = None
    pool: dict[str, Any] | None = None
    reason: str = ""

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def norms(self) -> list[Norm]:
        return [self.norm, *([] if self.residual_norm is None else [self.residual_norm])]

    @property
    def takes_conv(self) -> bool:
        """Whether the fused call runs the convolution too. (Otherwise it only adds the bias.)"""
        return self.norm.conv is not None and self.residual_norm is None and self.pool is None

    @property
    def replaced(self) -> set[fx.Node]:
        """All nodes that are no longer needed."""
        counts = [norm.count for norm in self.norms]
        conv = self.norm.conv.node if self.norm.conv is not None and self.takes_conv else None
        return {n for n in (*self.nodes, *counts, conv) if n is not None}

    @property
    def pattern(self) -> str:
        return "".join(
            [
                "conv-bn" if self.norm.conv is not None else "bn",
                "+bn" if self.residual_norm is not None else "",
                "-add" if self.residual is not None or self.residual_norm is not None else "",
                "-act" if self.act is not None else "",
                "-pool" if self.pool is not None else "",
            ]
        )


def norm_of(node: fx.Node) -> Norm | None:
    """The batch norm that a node calls, if our operations support it."""
    if node.op != "call_function" or node.target is not F.batch_norm:
        return None
    bound = BATCH_NORM.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    a = bound.arguments
    x, training = value(a["input"]), a["training"]
    if x is None or not 2 <= x.dim() <= 5 or x.dtype not in SUPPORTED_DTYPES:
        return None
    count = _count_of(node) if training else None
    conv = convolution(a["input"]) if only_user(a["input"]) is not None else None
    state: Any = BatchNormState(
        a["running_mean"], a["running_var"], a["weight"], a["bias"], a["momentum"], a["eps"],
        count.all_input_nodes[0] if count is not None else None,  # type: ignore[arg-type]
    )  # fmt: skip
    return Norm(node, a["input"], state, training, count, conv)


def _count_of(node: fx.Node) -> fx.Node | None:
    """The addition to ``num_batches_tracked`` that a module makes before its call of batch norm."""
    before = node.prev
    if before.target != "add_" or before.args[1:] != (1,) or before.kwargs or before.users:
        return None
    counter: Any = before.args[0]
    one = getattr(value(counter), "shape", None) == ()
    return before if one and only_user(counter) is before else None


def longest(norm: Norm) -> Match:
    """A batch norm with all that can be fused with it, before `hazard` checks the other nodes."""
    match = Match(norm, [norm.node])
    user = only_user(norm.node)
    if user is None:
        match.reason = "its output is used more than once" if norm.node.users else ""
        return match
    both = addition(user)
    if both is not None and both[0] is not both[1]:
        other = both[1] if both[0] is norm.node else both[0]
        if not alike(norm.node, other):
            match.reason = "the added tensor has another shape or dtype"
            return match
        second = _residual_norm(norm, other)
        if (
            writes(user)
            and both[0] is not norm.node
            and second is None
            and not dies_in(both[0], user)
        ):
            match.reason = "the addition writes to a tensor that is used elsewhere"
            return match
        match.residual = other if second is None else None
        match.residual_norm = second
        match.nodes += [user] if second is None else [second.node, user]
        user = only_user(user)
    if user is not None and (act := activation(user)) is not None:
        match.act = act
        match.nodes.append(user)
        user = only_user(user)
    alone = match.residual is None and match.residual_norm is None
    found = value(norm.node)
    if user is not None and alone and found is not None and found.dim() == 4:
        match.pool = pooling(user)
        match.nodes += [] if match.pool is None else [user]
    return match


def _residual_norm(norm: Norm, other: fx.Node) -> Norm | None:
    """The batch norm of the residual, if one operation can run both."""
    second = norm_of(other) if only_user(other) is not None else None
    if second is None or second.training != norm.training or second.buffers & norm.buffers:
        return None
    # One operation of two fixed norms keeps both inputs for backward; two operations keep neither.
    weights = (value(norm.state.weight), value(second.state.weight))
    fixed = not norm.training and not any(getattr(w, "requires_grad", False) for w in weights)
    return None if fixed and getattr(value(norm.node), "requires_grad", False) else second


def hazard(match: Match, order: dict[fx.Node, int]) -> str:
    """Why the calls of a match can't move to its last node; empty if they can."""
    # A convolution that stays in the graph runs without its bias, which the fused call adds.
    convs = {norm.conv.node for norm in match.norms if norm.conv and norm.conv.bias is not None}
    buffers = {b for norm in match.norms for b in norm.buffers}
    found = obstacle(match.replaced | convs, buffers, order)
    if found:
        return found
    # Our backward may read these; torch's own does not. In an in-place addition later writes are to
    # the sum. The fused sum is a new tensor, so they do not change the residual.
    becomes_sum = match.residual in [w for n in match.nodes for w in writes(n) or []]
    kept = {
        "the added tensor": [] if becomes_sum else [match.residual],
        "its bias": [norm.state.bias for norm in match.norms],
    }
    after = list(order)[order[match.end] + 1 :]
    written = {storage(w) for n in after for w in writes(n) or []}
    for name, nodes in kept.items():
        if any(storage(n) in written for n in nodes if isinstance(n, fx.Node)):
            return f"{name} is written in place afterwards"
    return ""


def obstacle(own: set[fx.Node], buffers: set[int | None], order: dict[fx.Node, int]) -> str:
    """Why some nodes can't all move to the place of the last of them; empty if they can.

    Args:
        own: the nodes to move.
        buffers: the storages that they write to.
        order: the place of each node in the graph.
    """
    places = [order[n] for n in own]
    inputs = [n for m in own for n in m.all_input_nodes if n not in own]
    for node in list(order)[min(places) : max(places)]:
        if node in own:
            continue
        written = writes(node)
        if written is None:
            return f"between it and the next operations, {node.target} may change anything"
        if any(storage(n) in buffers for n in node.all_input_nodes):
            return "between it and the next operations, its statistics are used"
        # Only writes after an input was computed can change it.
        earlier = {storage(n) for n in inputs if order[n] < order[node]}
        if any(storage(w) in (None, *earlier) for w in written):
            return "between it and the next operations, one of its inputs is written in place"
    return ""


def find(node: fx.Node, order: dict[fx.Node, int]) -> Match | str:
    """What can be fused with a node's batch norm, or why it can't run as our operation."""
    norm = norm_of(node)
    if norm is None:
        return "bnres does not support the dtype or the number of dimensions of its input"
    state = norm.state._replace(num_batches_tracked=None)
    bare = replace(norm, state=state, count=None, conv=None)
    reason = found = ""
    for match in (longest(norm), Match(norm, [node]), Match(bare, [node])):
        found = hazard(match, order)
        if not found:
            match.reason = match.reason or reason
            return match
        reason = reason or found
    return found
