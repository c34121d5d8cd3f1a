"""Weights in files of safetensors: where training starts, and what it leaves."""

from pathlib import Path

import torch
from torch import Tensor, nn

from bnres.models.trial import shape_text

SUFFIX = ".safetensors"


def is_weights(init: str) -> bool:
    """Whether initial weights are a file's."""
    return init.endswith(SUFFIX)


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
    own = model.state_dict()
    for key, value in own.items():
        if key not in found:
            raise ValueError(f"init: {path} has no {key!r}, which model {name!r} has")
        if found[key].shape != value.shape:
            raise ValueError(
                f"init: {key!r} is {shape_text(found[key].shape)} in {path}, but "
                f"{shape_text(value.shape)} in model {name!r}"
            )
    for key in found:
        if key not in own:
            raise ValueError(f"init: {path} has {key!r}, which model {name!r} does not have")
    model.load_state_dict(found)


def as_safetensors(model: nn.Module) -> bytes:
    """A net's parameters and buffers as the content of such a file; shared ones are in it twice.

    Raises:
        ModuleNotFoundError: as `load_weights`.
    """
    from safetensors.torch import save

    def copied(value: Tensor) -> Tensor:
        return value.detach().clone(memory_format=torch.contiguous_format)

    return save({key: copied(value) for key, value in model.state_dict().items()})
