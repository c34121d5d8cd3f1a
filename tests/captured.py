"""Captures the graphs of compiled models."""

from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd


def recorder() -> tuple[Any, list[fx.GraphModule]]:
    """Returns a backend that runs graphs uncompiled, and the list to which it adds each graph."""
    graphs: list[fx.GraphModule] = []

    def record(graph: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return record, graphs


def capture(model: Any, **options: Any) -> tuple[Any, list[fx.GraphModule]]:
    """Returns the compiled model, and the list to which forward and backward graphs are added."""
    record, graphs = recorder()
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    return torch.compile(model, backend=backend, fullgraph=True, **options), graphs
