"""The stages of a model and the shapes of their outputs."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Stage:
    """A direct child of a model: its name, its class, the shape of its output."""

    name: str
    cls: str
    shape: tuple[int, ...]


def summarize(model: nn.Module, shape: tuple[int, ...]) -> list[Stage]:
    """The stages in the order in which an input of this shape passes them.

    The model runs in eval mode on zeros; its modules' modes are restored.

    Raises:
        ValueError: if the model does not take such an input.
    """
    stages: list[Stage] = []
    handles = []
    for name, child in model.named_children():

        def record(module: nn.Module, _: object, output: Tensor, name: str = name) -> None:
            stages.append(Stage(name, type(module).__name__, tuple(output.shape)))

        handles.append(child.register_forward_hook(record))
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(shape))
    except RuntimeError as error:
        raise ValueError(f"the model takes no input of {shape}: {error}") from error
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()
    return stages
