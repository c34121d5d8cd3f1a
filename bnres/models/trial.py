"""Calls a model to see whether it takes an input."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnres.errors import first_line, is_out_of_memory


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape as users write it, such as ``1x3x224x224``."""
    return "x".join(map(str, shape)) or "scalar"


def try_call(call: Callable[[Tensor], Any], images: Tensor, name: str = "the model") -> Any:
    """What a model returns for an input, without gradients.

    Args:
        call: the model.
        images: the input.
        name: what an error calls the model.

    Raises:
        ValueError: if the model does not take such an input; it names the input's shape.
    """
    try:
        with torch.no_grad():
            return call(images)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        shape = shape_text(tuple(images.shape))
        raise ValueError(f"{name} takes no input of {shape}: {first_line(error)}") from error
