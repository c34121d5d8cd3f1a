"""The functions `fuse`, `unfuse` and `inductor`, and torch.compile's backend ``"bnres"``."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from bnres.fusion.dynamo import (
    compiled,
    in_fx_trace,
    lookup_backend,
    module_tensors,
    set_compiled_call,
    uncompiled_call,
)
from bnres.fusion.nodes import value
from bnres.nn.sync import CapturedSyncBatchNorm, make_nodes


def backend(
    module: fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Fuses batch norms in a captured graph, and returns a function that runs the graph.

    This is the backend ``"bnres"`` of `torch.compile`.

    Args:
        module: the graph that Dynamo captured. The graph is rewritten in place.
        example_inputs: the graph's inputs.
        options: ``{"inner": backend}`` sets the backend that compiles the rewritten graph. This
            backend is a function or a name, such as ``"inductor"``. By default the graph runs
            eagerly.

    Raises:
        ValueError: for an unknown option, or if ``inner`` is neither a string nor callable.
    """
    from bnres.fusion.rewrite import fuse_graphs

    others = dict(options or {})
    inner = others.pop("inner", "eager")
    if others:
        raise ValueError(f"options may only contain 'inner', got {min(others)!r}")
    if not (isinstance(inner, str) or callable(inner)):
        raise ValueError(f"options['inner'] must be a backend or its name, got {inner!r}")
    fuse_graphs(module)
    if inner == "eager":
        return run_eagerly(module)
    return lookup_backend(inner)(module, example_inputs)


def run_eagerly(module: fx.GraphModule) -> Callable[..., Any]:
    """Returns a function that runs a captured graph without a compiler.

    Torch's operator for activation checkpoints runs only in compiled graphs, so `_checkpointed`
    replaces it.
    """
    of_modules = module_tensors(module.graph)
    checkpoints = torch.ops.higher_order.tag_activation_checkpoint
    for graph in (m for m in module.modules() if isinstance(m, fx.GraphModule)):
        for node in graph.graph.find_nodes(op="call_function", target=checkpoints):
            node.target = _checkpointed
            node.update_kwarg("of_module", [id(value(n)) in of_modules for n in node.args[1:]])
        graph.recompile()
    return module.forward


def _checkpointed(
    body: fx.GraphModule, *args: Any, of_module: Sequence[bool], **options: Any
) -> Any:
    """Runs ``body`` in an activation checkpoint.

    ``of_module`` says for each argument whether it is a module's parameter or buffer. Parameters
    and buffers are not passed to `checkpoint`, because batch norm writes to some of them in place,
    and backward raises an error if an argument of `checkpoint` was written in place.
    """
    options["use_reentrant"] = False
    if "_checkpoint_context_fn" in body.meta:
        options["context_fn"] = body.meta["_checkpoint_context_fn"]
    inputs = list(zip(args, of_module, strict=True))

    def run(*given: Any) -> Any:
        rest = iter(given)
        return body.forward(*(arg if known else next(rest) for arg, known in inputs))

    return checkpoint(run, *(arg for arg, known in inputs if not known), **options)


@contextmanager
def inductor() -> Iterator[None]:
    """A context in which Inductor fuses batch norms in the graphs that it compiles.

    ``torch.compile`` compiles a function at its first call, so make this call inside the context.
    Batch norms are fused before autograd traces a graph, and after the passes that the user has set
    in ``torch._inductor.config.pre_grad_custom_pass``.

    AOTAutograd caches the graphs that are compiled in this context, unlike those that the backend
    ``"bnres"`` compiles with ``options={"inner": "inductor"}``.
    """
    from bnres.fusion.inductor import with_pass

    with with_pass():
        yield


def fuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Returns a copy of a model in which batch norms are fused with the operations around them.

    The copy works like a model after ``model.compile(backend="bnres")``. At its first call, Dynamo,
    the part of torch.compile that reads Python code, captures a graph of the model's operations.
    bnres fuses each batch norm in this graph with operations before and after the batch norm.
    `bnres.explain` shows which operations are fused. Later calls run the same graph. If Python
    state on which the graph depends has changed, Dynamo captures a new graph.

    The rules of ``torch.compile`` apply:

    - A forward or backward hook that is added after the first call does not run.
    - A submodule that is called directly runs unfused.
    - At most ``torch._dynamo.config.recompile_limit`` graphs are captured. A call that would need
      one more graph runs unfused.

    Args:
        model: any module, in any mode, on any device.
        inplace: whether to fuse ``model`` itself instead of a copy.

    Returns:
        The fused model. Its class, parameters, hooks and state-dict keys are those of ``model``.
        Its repr contains "fused by bnres". Copies and pickles of the fused model are not fused.
        `torch.export`, `torch.jit.trace` and `torch.fx` read the fused model as if it were not
        fused.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    model = unfuse(model, inplace=inplace)
    make_nodes(model)
    stock = uncompiled_call(model)
    fused = compiled(stock, backend)

    def call(*args: Any, **kwargs: Any) -> Any:
        traced = torch.jit.is_tracing() or in_fx_trace()
        return (stock if traced else fused)(*args, **kwargs)

    set_compiled_call(model, call)
    model.extra_repr = _FusedRepr(model)  # type: ignore[method-assign]
    return model


class _FusedRepr:
    """The ``extra_repr`` of a fused model.

    Copies and pickles of the model are not fused, so they have the model's original ``extra_repr``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.own = model, model.extra_repr

    def __call__(self) -> str:
        return ", ".join(filter(None, ("fused by bnres", self.own())))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.model, "extra_repr")


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Returns an unfused copy of a model.

    Args:
        model: any module, fused or not.
        inplace: whether to change ``model`` itself instead of a copy.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not inplace:
        return copy.deepcopy(model)  # copies of a fused model are not fused
    for module in model.modules():
        set_compiled_call(module, None)
        if isinstance(module.__dict__.get("extra_repr"), _FusedRepr):
            del module.extra_repr
        if type(module) is CapturedSyncBatchNorm:
            module.__class__ = nn.SyncBatchNorm  # type: ignore[assignment]
    return model
