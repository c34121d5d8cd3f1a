"""Calls a model to check whether it accepts an input."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnres.errors import first_line, is_out_of_memory


def shape_text(shape: tuple[int, ...]) -> str:
    """Returns a shape as text in the form of the command line, such as ``1x3x224x224``."""
    return "x".join(map(str, shape)) or "scalar"


def try_call(call: Callable[[Tensor], Any], images: Tensor, name: str = "the model") -> Any:
    """Calls a model without gradients and returns its output.

    Args:
        call: the model.
        images: the input.
        name: name of the model in errors.

    Raises:
        ValueError: if the model does not accept the input. The error names the input's shape.
    """
    try:
        with torch.no_grad():
            return call(images)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        shape = shape_text(tuple(images.shape))
        raise ValueError(
            f"{name} does not accept inputs of {shape}: {first_line(error)}"
        ) from error
