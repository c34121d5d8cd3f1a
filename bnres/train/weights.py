"""Checks that weights fit a model, and reads and writes them as safetensors."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bnres.models.trial import shape_text

SUFFIX = ".safetensors"


def is_weights(init: str) -> bool:
    """Whether the option ``init`` is the path of a file of weights."""
    return init.endswith(SUFFIX)


def check_weights(found: Mapping[str, object], model: nn.Module, source: str, name: str) -> None:
    """Raises a ValueError unless weights have exactly the keys and shapes of a model.

    Args:
        found: the weights by key.
        model: the model.
        source: where the weights come from, for the error.
        name: name of the model, for the error.
    """
    own = model.state_dict()
    for key, value in own.items():
        if key not in found:
            raise ValueError(f"{source} has no key {key!r}, which model {name!r} has")
        other = found[key]
        if isinstance(value, Tensor) and isinstance(other, Tensor) and other.shape != value.shape:
            raise ValueError(
                f"{source} has shape {shape_text(other.shape)} for {key!r}, but model {name!r} has "
                f"{shape_text(value.shape)}"
            )
    for key in found:
        if key not in own:
            raise ValueError(f"{source} has the key {key!r}, which model {name!r} does not have")


def load_weights(path: Path, model: nn.Module, name: str) -> None:
    """Sets a model's parameters and buffers to the tensors in a safetensors file.

    Args:
        path: the file.
        model: the model.
        name: name of the model, for errors.

    Raises:
        ValueError: if the file can't be read, if its keys or shapes differ from the model's, or if
            the model has state that is not a tensor.
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
    check_weights(found, model, f"init: {path}", name)
    model.load_state_dict(found)


def as_safetensors(model: nn.Module) -> bytes:
    """Returns a model's parameters and buffers as the content of a safetensors file.

    A tensor that has several keys is written once for each key.

    Raises:
        ValueError: if the model has state that is not a tensor.
        ModuleNotFoundError: if safetensors is missing.
    """
    from safetensors.torch import save

    def copied(value: Tensor) -> Tensor:
        return value.detach().clone(memory_format=torch.contiguous_format)

    check_only_tensors(model, type(model).__name__)
    return save({key: copied(value) for key, value in model.state_dict().items()})


def check_only_tensors(model: nn.Module, name: str) -> None:
    """Raises a ValueError if a model has state that is not a tensor.

    A module can add such state by ``get_extra_state``.
    """
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"model {name!r} has a {type(value).__name__} in {key!r}, but safetensors holds "
                "only tensors"
            )
