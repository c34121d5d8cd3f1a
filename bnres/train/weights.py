"""Weights that a model is started from or restored from, and files of safetensors."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bnres.models.trial import shape_text

SUFFIX = ".safetensors"


def is_weights(init: str) -> bool:
    """Whether initial weights are a file's."""
    return init.endswith(SUFFIX)


def check_weights(found: Mapping[str, object], model: nn.Module, source: str, name: str) -> None:
    """Raises a ValueError unless weights have exactly the keys and shapes of a model.

    Args:
        found: the weights by key.
        model: the model.
        source: where they come from, for the error.
        name: of the model, for the error.
    """
    own = model.state_dict()
    for key, value in own.items():
        if key not in found:
            raise ValueError(f"{source} has no {key!r}, which model {name!r} has")
        other = found[key]
        if isinstance(value, Tensor) and isinstance(other, Tensor) and other.shape != value.shape:
            raise ValueError(
                f"{source} has {shape_text(other.shape)} in {key!r}, but model {name!r} has "
                f"{shape_text(value.shape)}"
            )
    for key in found:
        if key not in own:
            raise ValueError(f"{source} has {key!r}, which model {name!r} does not have")


def load_weights(path: Path, model: nn.Module, name: str) -> None:
    """Sets a net's parameters and buffers to those in a file.

    Args:
        path: the file.
        model: the net.
        name: of the net, for errors.

    Raises:
        ValueError: if the file can't be read, or its keys and shapes are not the net's.
        ModuleNotFoundError: if safetensors is missing, which comes with ``bnres[train]``.
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
    """A net's parameters and buffers as the content of such a file; shared ones are in it twice.

    Raises:
        ValueError: if the net has state that is not a tensor, which such a file can't hold.
        ModuleNotFoundError: as `load_weights`.
    """
    from safetensors.torch import save

    def copied(value: Tensor) -> Tensor:
        return value.detach().clone(memory_format=torch.contiguous_format)

    check_only_tensors(model, type(model).__name__)
    return save({key: copied(value) for key, value in model.state_dict().items()})


def check_only_tensors(model: nn.Module, name: str) -> None:
    """Raises a ValueError if a model's state has more than tensors, as by ``get_extra_state``."""
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"model {name!r} keeps a {type(value).__name__} in {key!r}, and safetensors holds "
                "tensors only"
            )
