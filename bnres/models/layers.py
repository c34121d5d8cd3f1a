"""The layers that a net is given: each batch norm with the activation and the pooling after it."""

from collections.abc import Callable
from typing import Any

from torch import nn

from bnres.activations import as_module
from bnres.nn import BatchNormAct1d, BatchNormAct2d, BatchNormActMaxPool2d

NormAct = Callable[..., list[Any]]


def stock_norm_act(
    channels: int, act: str | None = "relu", *, pool: nn.MaxPool2d | None = None, dims: int = 2
) -> list[Any]:
    """Torch's own batch norm, activation and, if it is given, pooling.

    Args:
        channels: channels of the input.
        act: name of the activation, None for none.
        pool: a pooling after the activation, or None.
        dims: dimensions of an image: 2, or 1 for (N, C).

    Raises:
        ValueError: for an unknown activation.
    """
    norm = nn.BatchNorm1d(channels) if dims == 1 else nn.BatchNorm2d(channels)
    return [norm, as_module(act), *([] if pool is None else [pool])]


def fused_norm_act(
    channels: int, act: str | None = "relu", *, pool: nn.MaxPool2d | None = None, dims: int = 2
) -> list[Any]:
    """As `stock_norm_act`, with everything in the batch norm; the activation and the pooling become an Identity each."""
    if pool is None:
        cls = BatchNormAct1d if dims == 1 else BatchNormAct2d
        return [cls(channels, act_layer=act), nn.Identity()]
    norm = BatchNormActMaxPool2d(
        channels, pool.kernel_size, pool.stride, pool.padding, act_layer=act
    )
    return [norm, nn.Identity(), nn.Identity()]
