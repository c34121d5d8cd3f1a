"""Finds the batch norms in a captured graph and the operations that can be fused with each."""

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import fx

from bnres.functional import (
    batch_norm_act,
    batch_norm_act_max_pool2d,
    conv2d_batch_norm_act,
    sync_batch_norm_act,
)
from bnres.fusion.nodes import (
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
from bnres.operations.sync_batch_norm_act import sync_batch_norm

SIGNATURES = {norm: inspect.signature(norm) for norm in (F.batch_norm, sync_batch_norm)}


@dataclass
class NormCall:
    """A call of batch norm.

    Attributes:
        node: the node of the call.
        calls: ``node``, and the addition that increments ``num_batches_tracked`` if there is one.
        input: the node that the call normalises.
        state: the call's options, as a `BatchNormState` that contains nodes instead of tensors.
            ``state.input_bias`` is the bias in ``conv``, or None if there is none.
        training: whether the call normalises with the statistics of the batch.
        conv: the arguments of the convolution before the call, or None if the convolution can't be
            fused or does not exist.
        group: the name of the process group if the batch norm is synchronised, otherwise empty.
    """

    node: fx.Node
    calls: set[fx.Node]
    input: fx.Node
    state: Any
    training: bool
    conv: dict[str, Any] | None
    group: str

    @property
    def operation(self) -> Any:
        """The function that fuses this batch norm with a residual and an activation."""
        return sync_batch_norm_act if self.group else batch_norm_act

    @property
    def buffers(self) -> set[int | None]:
        """The identifiers of the memory to which ``calls`` write (see `storage`)."""
        return {storage(n) for call in self.calls for n in writes(call) or []}


@dataclass
class Match:
    """The nodes that one fused call replaces.

    Attributes:
        operation: the function of the fused call.
        norms: one or two calls of batch norm. The second call normalises the residual.
        nodes: the replaced nodes, except the convolution.
        pattern: the names of the fused operations, such as ``conv-bn-act``.
        options: the arguments of the fused call, except those of the first batch norm.
        reason: why no further operation is fused. The reason may be empty.
    """

    operation: Any
    norms: list[NormCall]
    nodes: set[fx.Node]
    pattern: str
    options: dict[str, Any]
    reason: str = ""

    @property
    def replaced(self) -> set[fx.Node]:
        """The nodes to remove, including the convolution if the fused call computes it."""
        takes_conv = self.operation is conv2d_batch_norm_act
        return self.nodes | {self.norms[0].input} if takes_conv else self.nodes

    def add(self, nodes: set[fx.Node], pattern: str, **options: Any) -> None:
        """Adds nodes, their part of the pattern, and arguments of the fused call."""
        self.nodes |= nodes
        self.pattern += pattern
        self.options |= options


def norm_call(node: fx.Node) -> NormCall | None:
    """Returns the batch norm that a node calls, or None if it calls none that bnres supports."""
    if node.target not in SIGNATURES:
        return None
    bound = SIGNATURES[node.target].bind(*node.args, **node.kwargs)  # type: ignore[index]
    bound.apply_defaults()
    options = bound.arguments
    input, training = options.pop("input"), options.pop("training")
    x = value(input)
    if x is None or x.dim() > 5 or x.dtype not in SUPPORTED_DTYPES:
        return None
    group: Any = options.pop("group", "")
    calls, counter = {node}, options.pop("num_batches_tracked", None)
    if node.target is F.batch_norm and training:
        counter = _counter(node)
        calls |= set() if counter is None else {node.prev}
    # In training, the backward of a fused call returns 0 as the gradient of the convolution's bias.
    # With a process group, only the sum of this gradient over all processes is 0, so the
    # convolution is not fused.
    conv = convolution(input) if only_user(input) is not None and not group else None
    bias = None if conv is None else conv.get("bias")
    state = BatchNormState(**options, num_batches_tracked=counter, input_bias=bias)
    return NormCall(node, calls, input, state, training, conv, group)


def _counter(node: fx.Node) -> Any:
    """Returns the counter that the node before a batch norm increments by 1, or None."""
    before = node.prev
    if before.target != "add_" or before.args[1:] != (1,) or before.kwargs or before.users:
        return None
    counter: Any = before.args[0]
    one = getattr(value(counter), "shape", None) == ()
    return counter if one and only_user(counter) is before else None


def shortest(norm: NormCall) -> Match:
    """Returns the match of a batch norm and, if it can be fused, the convolution before it."""
    where = {"process_group": norm.group} if norm.group else {"training": norm.training}
    options = {**where, "act": None}
    if norm.conv is None:
        return Match(norm.operation, [norm], set(norm.calls), "bn", options)
    return Match(conv2d_batch_norm_act, [norm], set(norm.calls), "conv-bn", options)


def longest(norm: NormCall) -> Match:
    """Returns the match of a batch norm and everything that can be fused with it.

    `hazard` checks later whether other nodes of the graph prevent the fusion.
    """
    match = shortest(norm)
    user: Any = only_user(norm.node)
    if user is None:
        match.reason = "its output is used more than once" if norm.node.users else ""
        return match
    terms = addition(user)
    if terms is not None and terms[0] is not terms[1]:
        other = terms[1] if terms[0] is norm.node else terms[0]
        if not alike(norm.node, other):
            match.reason = "the added tensor has another shape or dtype"
            return match
        second = _residual_norm(norm, other)
        if second is not None:
            match.operation = norm.operation
            match.norms.append(second)
            match.add(second.calls, "+bn", residual_norm=second.state)
        elif terms[0] is other and writes(user):
            if not dies_in(other, user):
                match.reason = "the addition writes to a tensor that is used elsewhere"
                return match
            # Under torch.no_grad, ``residual += z`` keeps the autograd graph of the residual, but
            # the output of a fused call would have none. The nodes do not tell whether they run
            # under torch.no_grad.
            if value(other).requires_grad and not value(norm.node).requires_grad:  # type: ignore[union-attr]
                match.reason = (
                    "the addition writes to a tensor that needs a gradient, but the output of the "
                    "batch norm needs none"
                )
                return match
        match.add({user}, "-add", residual=other if second is None else second.input)
        user = only_user(user)
    act = activation(user)
    if act is not None:
        match.add({user}, "-act", act=act[0], act_kwargs=act[1])
        user = only_user(user)
    pool = pooling(user) if "residual" not in match.options else None
    if pool is not None and not norm.group and getattr(value(norm.node), "ndim", 0) == 4:
        match.operation = batch_norm_act_max_pool2d
        match.add({user}, "-pool", **pool)
    return match


def _residual_norm(norm: NormCall, other: fx.Node) -> NormCall | None:
    """Returns the batch norm that computes ``other`` if it can be fused with ``norm``, or None."""
    second = norm_call(other) if only_user(other) is not None else None
    if second is None or second.buffers & norm.buffers:
        return None
    if (second.training, second.group) != (norm.training, norm.group):
        return None
    # Two batch norms with fixed statistics and weights are not fused, because the fused operation
    # would store both inputs for backward. Separate operations store neither input.
    weights = (value(norm.state.weight), value(second.state.weight))
    fixed = not norm.training and not any(getattr(w, "requires_grad", False) for w in weights)
    return None if fixed and getattr(value(norm.node), "requires_grad", False) else second


def hazard(match: Match) -> str:
    """Returns why a match can't be replaced by a call at the position of the match's last node.

    If it can, the result is an empty string.
    """
    # The fused call adds the bias of a convolution that stays in the graph. So nothing may write to
    # this bias between the convolution and the fused call.
    convs = {norm.input for norm in match.norms if norm.state.input_bias is not None}
    buffers = {b for norm in match.norms for b in norm.buffers}
    found = obstacle(match.replaced | convs, buffers)
    if found:
        return found
    # Unlike torch's backward, ours may read the residual and the biases of the batch norms. So a
    # later write to one of them prevents the fusion. But after ``residual += z``, a write to
    # ``residual`` is allowed. It changes only the sum, which the fused call stores in a new tensor.
    end = max(match.nodes)
    residual = match.options.get("residual") if len(match.norms) == 1 else None
    becomes_sum = residual in [w for n in match.nodes for w in writes(n) or []]
    biases = [norm.state.bias for norm in match.norms]
    kept = {storage(n) for n in biases if isinstance(n, fx.Node)}
    if residual is not None and not becomes_sum:
        # A written node without storage may be a list that contains the residual.
        kept |= {storage(residual), None}
    for node in end.graph.nodes:
        if not node > end or node.op == "output":
            continue
        inputs = set(map(storage, node.all_input_nodes))
        if not inputs & kept:
            continue
        written = writes(node)
        if inputs & kept - {None} if written is None else kept & set(map(storage, written)):
            return "the added tensor or the bias of the batch norm is written in place afterwards"
    return ""


def obstacle(own: set[fx.Node], buffers: set[int | None]) -> str:
    """Returns why the nodes ``own`` can't all move to the position of their last node.

    If they can, the result is an empty string.

    Args:
        own: the nodes to move.
        buffers: identifiers of the memory to which these nodes write (see `storage`).
    """
    first, last = min(own), max(own)
    inputs = {n for m in own for n in m.all_input_nodes}
    for node in last.graph.nodes:
        if node in own or not first < node < last:
            continue
        written = writes(node)
        if written is None:
            return f"{node.target} runs between the operations to fuse and may have any side effect"
        if any(storage(n) in buffers for n in node.all_input_nodes):
            return "its statistics are used between the operations to fuse"
        # A write can only change inputs that were computed earlier. A written node without storage
        # may be a list that contains an input.
        earlier = {storage(n) for n in inputs if n < node}
        if any(storage(w) in (None, *earlier) for w in written):
            return "one of the inputs is written in place between the operations to fuse"
    return ""


def find(node: fx.Node) -> Match | str:
    """Returns the longest match of a batch norm that has no `hazard`.

    If the batch norm can't be fused, the result is the reason.
    """
    norm = norm_call(node)
    if norm is None:
        return "bnres does not support the class, dtype or number of dimensions of its input"
    state = norm.state._replace(num_batches_tracked=None, input_bias=None)
    bare = replace(norm, calls={node}, state=state, conv=None)
    reasons: list[str] = []
    for match in (longest(norm), shortest(norm), shortest(bare)):
        reasons.append(hazard(match))
        if not reasons[-1]:
            match.reason = match.reason or reasons[0]
            return match
    return reasons[-1]
