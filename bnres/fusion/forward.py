"""The forward that takes the place of a module's own, as an attribute of the instance."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from bnres.fusion import calls
from bnres.fusion.nodes import writes_in_place
from bnres.fusion.patterns import Branch, Found, Match, find
from bnres.fusion.trace import Guard, NotProvedError, trace
from bnres.nn.handout import LINKED, take


@dataclass
class Variant:
    """A rewritten forward and what it holds for."""

    guard: Guard
    run: Callable[..., Any]


class FusedForward:
    """Calls the variant that holds at the time, or the class's own forward.

    Pickles carry no code: it is derived again from the module's class when first needed.
    """

    # A mark for `bnres.nn.hooks`: a call that passes this forward by loses nothing.
    of_bnres = True

    def __init__(self, module: nn.Module, variants: list[Variant] | None = None) -> None:
        self.module = module
        self.variants = variants

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if self.variants is None:
            self.variants = variants_of(module)
        inputs = (*args, *kwargs.values()) if kwargs else args
        for variant in self.variants:
            if variant.guard.holds(module, inputs):
                return variant.run(module, *args, **kwargs)
        return type(module).forward(module, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "variants": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedForward":
        return FusedForward(copy.deepcopy(self.module, memo), self.variants)


def variants_of(module: nn.Module) -> list[Variant]:
    """The fused variants of a module's forward; none if nothing is proved of it."""
    try:
        return rewrite(module)[0]
    except NotProvedError:
        return []


def rewrite(module: nn.Module) -> tuple[list[Variant], Found]:
    """The fused variants of a module's forward, and what was found in it.

    Raises:
        NotProvedError: if the forward can't be traced, or does more than its graph says.
    """
    variants: dict[str, Variant] = {}
    merged = Found()
    for training in (True, False):
        graph, guard = _proved_graph(module, training)
        found = find(module, graph)
        merged.reasons.update(found.reasons)
        merged.links += [link for link in found.links if link not in merged.links]
        for name, count in found.calls.items():
            merged.calls[name] = max(count, merged.calls.get(name, 0))
        if not found.matches:
            continue
        merged.matches = merged.matches or found.matches
        graph_text = str(graph)
        if graph_text in variants:
            # One graph for both modes.
            variants[graph_text].guard.attributes.pop("training")
            continue
        calls_of: dict[fx.Node, fx.Node] = {}
        for match in found.matches:
            _replace(module, graph, match, calls_of)
        variants[graph_text] = Variant(guard, _compiled(graph))
    return list(variants.values()), merged


def _proved_graph(module: nn.Module, training: bool) -> tuple[fx.Graph, Guard]:
    """The graph in one mode, if it is all that the forward does."""
    other, _ = trace(module, training, grad=False)
    graph, guard = trace(module, training, grad=True)
    if str(graph) != str(other):
        raise NotProvedError("its forward depends on its children's mode, or on recorded gradients")
    return graph, guard


def _branch(graph: fx.Graph, branch: Branch) -> Any:
    """The modules of a branch, as an argument."""
    modules = [graph.create_node("get_attr", str(node.target)) for node in branch.nodes]
    return modules[0] if branch.is_sequential else tuple(modules)


def _option(graph: fx.Graph, value: Any, node: fx.Node | None) -> Any:
    """An activation or a pooling as an argument: its module, or what says it."""
    if isinstance(value, nn.Module):
        assert node is not None
        return graph.create_node("get_attr", str(node.target))
    return value


def _replace(
    root: nn.Module, graph: fx.Graph, match: Match, calls_of: dict[fx.Node, fx.Node]
) -> None:
    """Puts the fused call in the place of a match's nodes; ``calls_of`` has those put before."""
    match.main.input = calls_of.get(match.main.input, match.main.input)
    if match.residual is not None:
        match.residual = calls_of.get(match.residual, match.residual)
    output_only = [user.op for user in match.end.users] == ["output"]
    returned = output_only and next(iter(match.end.users)).args == (match.end,)
    skip = _skip_input(root, graph, match)
    with graph.inserting_before(match.end):
        branch = _branch(graph, match.main)
        act = _option(graph, match.act, match.act_node)
        x = match.main.input
        if match.pool is not None:
            pool = _option(graph, match.pool, match.pool_node)
            call = graph.call_function(calls.norm_pool, (branch, x, act, pool))
        else:
            options: dict[str, Any] = {"act": act}
            if match.residual is not None:
                options["residual"] = match.residual if skip is None else skip
                # The link is made, or not, by what stands around the module.
                options["offers"] = returned and graph.create_node("get_attr", LINKED)
            if match.shortcut is not None:
                options["residual_branch"] = _branch(graph, match.shortcut)
            call = graph.call_function(calls.norm, (branch, x), options)
    match.end.replace_all_uses_with(call)
    calls_of[match.end] = call
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in sorted(match.nodes, key=order.__getitem__, reverse=True):
        graph.erase_node(node)


def _skip_input(root: nn.Module, graph: fx.Graph, match: Match) -> fx.Node | None:
    """If the residual is an input with exactly one other consumer: a tensor of its own for it."""
    source = match.residual
    if source is None or source.op != "placeholder" or len(source.users) != 2:
        return None
    other = [user for user in source.users if user not in match.nodes]
    if len(other) != 1 or writes_in_place(root, other[0]):
        return None
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        pair = graph.call_function(take, (source,))
    with graph.inserting_after(pair):
        first = graph.call_method("__getitem__", (pair, 0))
        second = graph.call_method("__getitem__", (pair, 1))
    other[0].replace_input_with(source, first)
    if match.main.input is source:
        match.main.input = first
    return second


def _compiled(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a function of the module and the forward's arguments."""
    code = graph.python_code("self")
    space = dict(code.globals)
    exec(compile(code.src, "<bnres.fusion>", "exec"), space)
    return space["forward"]
