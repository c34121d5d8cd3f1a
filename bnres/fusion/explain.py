"""The function `explain`. It reports which batch norms are fused, and why others are not."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from bnres.backend import use_backend
from bnres.fusion.backend import run_eagerly, unfuse
from bnres.fusion.dynamo import compiled, graph_breaks
from bnres.fusion.report import FusionReport, Site
from bnres.nn.sync import make_nodes


def explain(model: nn.Module, *inputs: Any, **kwargs: Any) -> FusionReport:
    """Returns a report of what `bnres.fuse` does to a model that is called with these inputs.

    A copy of the model is called once, in the same mode (training or eval) as the model.

    Args:
        model: any module.
        inputs, kwargs: example arguments of the model.

    Returns:
        A report with a row for each batch norm. ``str(report)`` also explains the patterns in the
        rows.

    Raises:
        TypeError: if ``model`` is not a module, or if there are no example arguments.
    """
    twin = unfuse(model)
    if not (inputs or kwargs):
        raise TypeError("explain needs example inputs of the model: explain(model, *inputs)")
    make_nodes(twin)
    norms = {name: module for name, module in twin.named_modules() if is_norm(module)}
    names = {id(t): name for name, m in norms.items() for t in (*m.parameters(), *m.buffers())}
    found: dict[str, Site] = {}

    def record(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from bnres.fusion.rewrite import fuse_graphs

        placeholders = module.graph.find_nodes(op="placeholder")
        rows, run = fuse_graphs(module), run_eagerly(module)

        # Modules of the same class may share one graph, whose nodes have the first module's name.
        # The parameters and buffers in ``args`` tell which module is called.
        def call(*args: Any) -> Any:
            tensors = dict(zip(placeholders, args, strict=True))
            for site, nodes in rows:
                given = [names[id(tensors[n])] for n in nodes if id(tensors.get(n)) in names]
                name = given[0] if given else site.name
                found.setdefault(name, replace(site, name=name))
            return run(*args)

        return call

    before = graph_breaks()
    # With the backend "aten", no kernel has to be compiled.
    devices = range(torch.cuda.device_count())
    with use_backend("aten"), torch.random.fork_rng(devices=devices):
        compiled(twin, record)(*inputs, **kwargs)
    breaks = [text for text, n in graph_breaks().items() if n > before.get(text, 0)]
    lines = breaks[0].splitlines()[:2] if breaks else []
    said = [line.strip().removeprefix("Explanation: ") for line in lines]
    reason = ": ".join(["torch.compile captured no call of it", *said])
    return FusionReport([found.get(n, Site(n, "-", reason, fused=False)) for n in norms])


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm.

    Some batch norms, such as FrozenBatchNorm2d, are not torch classes, so the buffers are checked.
    """
    instance_norm = nn.modules.instancenorm._InstanceNorm
    return "running_var" in module._buffers and not isinstance(module, instance_norm)
