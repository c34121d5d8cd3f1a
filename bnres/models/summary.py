"""Summarises the stages of a model: their names, output shapes and numbers of parameters.

The stages are the model's direct children.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnres.models.trial import shape_text, try_call


@dataclass(frozen=True)
class Stage:
    """A row of a summary.

    Most rows describe a direct child of a model. The others describe the parameters outside of all
    children, and the whole model.

    Attributes:
        name: name of the child.
        cls: name of the child's class.
        shape: shape of the output of the child's first call, or None if this output is not a
            tensor or the child was not called.
        parameters: number of elements of the child's parameters.
        note: further facts, such as ``called 2 times``, or an empty string.
    """

    name: str
    cls: str
    shape: tuple[int, ...] | None
    parameters: int
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """The stages of a model, and a row for the whole model.

    In the row for the whole model, parameters that several stages share count only once.
    """

    stages: list[Stage]
    total: Stage

    def __str__(self) -> str:
        rows = [("stage", "class", "output", "parameters", "")]
        for stage in (*self.stages, self.total):
            shape = "-" if stage.shape is None else shape_text(stage.shape)
            rows.append((stage.name, stage.cls, shape, f"{stage.parameters:,}", stage.note))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            f"{name:<{widths[0]}}  {cls:<{widths[1]}}  {shape:<{widths[2]}}  "
            f"{parameters:>{widths[3]}}  {note}".rstrip()
            for name, cls, shape, parameters, note in rows
        )


def summarize(model: nn.Module, shape: tuple[int, ...]) -> Summary:
    """Returns a summary of a model, with the stages in the order in which they are called.

    Stages that are not called come last. The model is called on zeros in eval mode. Afterwards the
    mode of each module is restored.

    Args:
        model: the model.
        shape: shape of the input.

    Raises:
        ValueError: if the model does not accept an input of this shape.
    """
    # named_children would list a child with two names only once.
    children = {name: child for name, child in model._modules.items() if child is not None}
    outputs: dict[nn.Module, list[Any]] = {}

    def record(module: nn.Module, _: Any, output: Any) -> None:
        outputs.setdefault(module, []).append(described(output))

    handles = [child.register_forward_hook(record) for child in {*children.values()}]
    modes = [(module, module.training) for module in model.modules()]
    try:
        output = try_call(model.eval(), torch.zeros(shape))
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()
    order = {module: i for i, module in enumerate(outputs)}
    called = sorted(children.items(), key=lambda item: order.get(item[1], len(order)))
    stages: list[Stage] = []
    first: dict[nn.Module, str] = {}
    for name, child in called:
        same = first.setdefault(child, name)
        notes = [] if same == name else [f"the same module as {same}"]
        stages.append(_stage(name, child, outputs.get(child, []), notes))
    own = sum(p.numel() for p in model.parameters(recurse=False))
    if own:
        note = "parameters outside of the stages"
        stages.append(Stage("-", type(model).__name__, None, own, note))
    return Summary(stages, _stage("total", model, [described(output)], []))


def described(output: Any) -> tuple[int, ...] | str:
    """Returns the shape of a tensor, or a text that describes an output that is not a tensor."""
    if isinstance(output, Tensor):
        return tuple(output.shape)
    if isinstance(output, tuple | list):
        parts = (shape_text(tuple(x.shape)) if isinstance(x, Tensor) else "-" for x in output)
        return f"returns {type(output).__name__}: {', '.join(parts)}"
    return f"returns {type(output).__name__}"


def _stage(name: str, module: nn.Module, outputs: list[Any], notes: list[str]) -> Stage:
    """Returns the row of a module. ``outputs`` has the result of `described` for each call."""
    shape = None
    if not outputs:
        has_forward = type(module).forward is not nn.Module.forward  # nn.ModuleList has none
        notes.append("not called" if has_forward else "has no forward")
    elif isinstance(outputs[0], str):
        notes.append(outputs[0])
    else:
        shape = outputs[0]
    if len(outputs) > 1:
        others = {o if isinstance(o, str) else shape_text(o) for o in outputs}
        different = f", outputs {', '.join(sorted(others))}" if len(others) > 1 else ""
        notes.append(f"called {len(outputs)} times{different}")
    count = sum(p.numel() for p in module.parameters())
    return Stage(name, type(module).__name__, shape, count, "; ".join(notes))
