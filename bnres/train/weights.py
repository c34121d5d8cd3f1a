"""Sets a model's weights, and reads and writes weights as safetensors."""

from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

SUFFIX = ".safetensors"


def is_weights(init: str) -> bool:
    """Whether the option ``init`` is the path of a file of weights."""
    return init.endswith(SUFFIX)


def set_weights(model: nn.Module, weights: Mapping[str, Any], source: str, name: str) -> None:
    """Sets the parameters and buffers of a model.

    The error names the origin of the weights (``source``) and the model (``name``).

    Raises:
        ValueError: if the keys or shapes of the weights differ from the model's.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        # The message's first line only names the model's class. Other lines may list many keys.
        lines = str(error).splitlines()[1:]
        reason = " ".join(shorten(line, 160, placeholder=" ...") for line in lines[:3])
        raise ValueError(f"{source} does not fit model {name!r}: {reason}") from error


def load_weights(path: Path, model: nn.Module, name: str) -> None:
    """Sets a model's parameters and buffers to the tensors in a safetensors file.

    Raises:
        ValueError: if the file can't be read or does not fit the model, or if the model has state
            that is not a tensor.
        ModuleNotFoundError: if safetensors is missing. The extra ``bnres[train]`` installs it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not path.is_file():
        raise ValueError(f"init: there is no file {str(path)!r}")
    try:
        found = load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"init: {path} can't be read: {error}") from error
    check_only_tensors(model, name)
    set_weights(model, found, f"init: {path}", name)


def as_safetensors(model: nn.Module) -> bytes:
    """Returns a model's parameters and buffers as the content of a safetensors file.

    A tensor with several keys is written once for each key.

    Raises:
        ValueError: if the model has state that is not a tensor.
    """
    from safetensors.torch import save

    def copied(value: Tensor) -> Tensor:
        return value.detach().clone(memory_format=torch.contiguous_format)

    check_only_tensors(model, type(model).__name__)
    return save({key: copied(value) for key, value in model.state_dict().items()})


def check_only_tensors(model: nn.Module, name: str) -> None:
    """Raises a ValueError if a model has state that is not a tensor.

    A module can add such state with ``get_extra_state``.
    """
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"model {name!r} has a {type(value).__name__} in {key!r}, but safetensors holds "
                "only tensors"
            )
