"""Finds the batch norms of a traced forward and what can be fused with each."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from bnres.fusion.nodes import (
    activation_of,
    addition,
    child,
    ends_in_norm,
    is_conv,
    is_norm,
    only_input,
    pooling_of,
    writes_in_place,
)
from bnres.nn.hooks import hooked


@dataclass
class Branch:
    """Modules that end in a batch norm: nodes of a convolution and of it, or of a Sequential."""

    nodes: list[fx.Node]
    input: fx.Node
    is_sequential: bool
    norm: str  # the batch norm's name in the traced module
    conv: str | None  # the name of the convolution in front of it


@dataclass
class Match:
    """Nodes that one fused call takes the place of."""

    main: Branch
    end: fx.Node
    nodes: list[fx.Node]
    residual: fx.Node | None = None
    shortcut: Branch | None = None
    act: tuple[str, dict[str, Any]] | nn.Module | None = None
    act_node: fx.Node | None = None
    pool: tuple[Any, ...] | nn.MaxPool2d | None = None
    pool_node: fx.Node | None = None

    @property
    def branches(self) -> list[Branch]:
        return [self.main] if self.shortcut is None else [self.main, self.shortcut]

    @property
    def pattern(self) -> str:
        parts = ["conv-bn" if self.main.conv else "bn"]
        if self.shortcut is not None:
            parts.append("+bn")
        if self.residual is not None:
            parts.append("-add")
        if self.act is not None:
            parts.append("-act")
        if self.pool is not None:
            parts.append("-pool")
        return "".join(parts)


@dataclass
class Found:
    """What a traced forward holds.

    Attributes:
        matches: calls to fuse.
        reasons: why a batch norm is in no match, or goes no further.
        links: pairs of modules of which the second alone takes the first one's output.
        calls: how often each module is called.
    """

    matches: list[Match] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    links: list[tuple[str, str]] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)


def branch_of(root: nn.Module, node: fx.Node) -> Branch | None:
    """The branch whose end a node is."""
    x = only_input(node)
    if x is None:
        return None
    if is_norm(root, node):
        norm = str(node.target)
        inner = only_input(x) if is_conv(root, x) and len(x.users) == 1 else None
        if inner is not None and isinstance(child(root, node), nn.BatchNorm2d):
            return Branch([x, node], inner, False, norm, str(x.target))
        return Branch([node], x, False, norm, None)
    if ends_in_norm(root, node):
        modules = child(root, node)
        assert isinstance(modules, nn.Sequential)
        names = [f"{node.target}.{name}" for name in modules._modules]
        has_conv = len(names) > 1 and type(modules[-2]) is nn.Conv2d
        return Branch([node], x, True, names[-1], names[-2] if has_conv else None)
    return None


def find(root: nn.Module, graph: fx.Graph) -> Found:
    """Every batch norm that ``graph``, the forward of ``root``, calls."""
    found = Found()
    used: set[fx.Node] = set()
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op == "call_module":
            name = str(node.target)
            found.calls[name] = found.calls.get(name, 0) + 1
            user = _only_user(node)
            if user is not None and user.op == "call_module" and only_input(user) is node:
                found.links.append((name, str(user.target)))
        main = branch_of(root, node)
        if main is None or node in used:
            continue
        match, reason = _grow(root, main, node, used)
        reason = _hazard(root, match, order) or reason
        if main.is_sequential and match.end is node:
            continue
        hook = next((n for n in _called(root, match) if hooked(n[1])), None)
        if hook is not None:
            reason = f"a hook waits on {hook[0]}"
        if reason:
            found.reasons[main.norm] = reason
        if hook is not None or reason.startswith("between"):
            continue
        used.update(match.nodes)
        if match.nodes != [node]:
            found.matches.append(match)
    return found


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _grow(root: nn.Module, main: Branch, node: fx.Node, used: set[fx.Node]) -> tuple[Match, str]:
    """The longest chain behind a batch norm, and why it ends where it does."""
    match = Match(main, node, list(main.nodes))
    user = _only_user(node)
    if user is None:
        return match, "" if not node.users else "its output is used elsewhere too"
    sum_of = addition(user)
    if sum_of is not None and sum_of.left is not sum_of.right:
        other = sum_of.right if sum_of.left is node else sum_of.left
        shortcut = branch_of(root, other) if len(other.users) == 1 and other not in used else None
        if sum_of.in_place and sum_of.left is not node and shortcut is None:
            return match, "the addition writes into a tensor that others may hold"
        match.residual = other if shortcut is None else shortcut.input
        match.shortcut = shortcut
        match.nodes += [] if shortcut is None else shortcut.nodes
        match.nodes.append(user)
        match.end = user
    user = _only_user(match.end)
    if user is not None and (act := activation_of(root, user)) is not None:
        match.act, match.act_node, match.end = act, user, user
        match.nodes.append(user)
        user = _only_user(user)
    if (
        user is not None
        and match.residual is None
        and isinstance(root.get_submodule(main.norm), nn.BatchNorm2d)
        and (pool := pooling_of(root, user)) is not None
    ):
        match.pool, match.pool_node, match.end = pool, user, user
        match.nodes.append(user)
    return match, ""


def _hazard(root: nn.Module, match: Match, order: dict[fx.Node, int]) -> str:
    """Why the call can't move to the chain's end: something on the way may change its input."""
    places = [order[node] for node in match.nodes]
    inside = [n for n, i in order.items() if min(places) < i < max(places) and n not in match.nodes]
    sources = {branch.input for branch in match.branches}
    if any(writes_in_place(root, n) for n in inside):
        return "between it and what follows, a tensor is written in place"
    if any(_may_write(root, n) and sources & set(n.all_input_nodes) for n in inside):
        return "between it and what follows, its input goes to a module that may write into it"
    return ""


def _may_write(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node calls a module of which nothing is known."""
    module = child(root, node)
    known = module is None or all(type(m).__module__.startswith("torch.") for m in module.modules())
    return not known


def _called(root: nn.Module, match: Match) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules whose own calls the fused call takes the place of."""
    for node in match.nodes:
        module = child(root, node)
        if module is not None:
            yield str(node.target), module
    for branch in match.branches:
        yield branch.norm, root.get_submodule(branch.norm)
        if branch.conv is not None:
            yield branch.conv, root.get_submodule(branch.conv)
