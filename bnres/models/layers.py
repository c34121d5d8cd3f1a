"""Builds batch norm, activation and pooling, either from torch's layers or as one fused layer."""

from collections.abc import Callable
from typing import Any

from torch import nn

from bnres.activations import as_module
from bnres.nn import BatchNormAct1d, BatchNormAct2d, BatchNormActMaxPool2d

NormAct = Callable[..., list[Any]]


def stock_norm_act(
    channels: int, act: str | None = "relu", *, pool: nn.MaxPool2d | None = None, dims: int = 2
) -> list[Any]:
    """Returns torch's layers for batch norm and activation, followed by ``pool`` if it is not None.

    Args:
        channels: number of channels of the input.
        act: name of the activation, or None for no activation.
        pool: a pooling after the activation, or None.
        dims: 2 for inputs (N, C, H, W), 1 for inputs (N, C).

    Raises:
        ValueError: if the activation is unknown.
    """
    norm = nn.BatchNorm1d(channels) if dims == 1 else nn.BatchNorm2d(channels)
    return [norm, as_module(act), *([] if pool is None else [pool])]


def fused_norm_act(
    channels: int, act: str | None = "relu", *, pool: nn.MaxPool2d | None = None, dims: int = 2
) -> list[Any]:
    """Returns one fused layer for batch norm, activation and pooling, followed by identities.

    The identities make the number of layers the same as with `stock_norm_act`.
    """
    if pool is None:
        cls = BatchNormAct1d if dims == 1 else BatchNormAct2d
        return [cls(channels, act_layer=act), nn.Identity()]
    norm = BatchNormActMaxPool2d(
        channels, pool.kernel_size, pool.stride, pool.padding, act_layer=act
    )
    return [norm, nn.Identity(), nn.Identity()]
