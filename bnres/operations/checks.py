"""Checks of a call's arguments, each of which raises for what does not fit."""

from typing import Any

import torch
from torch import Tensor

from bnres.kernels.dtypes import SUPPORTED_DTYPES


def check_input(input: Tensor, training: bool, name: str = "input") -> None:
    """Raises for a tensor that no batch norm takes, with the words of torch's own."""
    if not 2 <= input.dim() <= 5:
        raise ValueError(f"expected 2D to 5D {name} (got {input.dim()}D {name})")
    if input.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64, got {input.dtype}")
    channels = input.shape[1]
    if training and input.numel() == channels and channels:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {input.size()}"
        )


def check_norm(
    norm: Any, channels: int, device: torch.device, training: bool, prefix: str = ""
) -> None:
    """Raises for buffers and parameters that do not fit an input of ``channels`` on ``device``.

    ``norm`` has them as attributes; ``prefix`` begins their names in an error.
    """
    if not training:
        check_statistics(norm, prefix)
    for name in ("running_mean", "running_var", "weight", "bias"):
        tensor = getattr(norm, name)
        if tensor is None:
            continue
        if tensor.numel() != channels:
            raise RuntimeError(
                f"{prefix}{name} should contain {channels} elements not {tensor.numel()}"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{prefix}{name} must be of a floating dtype, got {tensor.dtype}")
        if tensor.device != device:
            raise RuntimeError(f"{prefix}{name} is on {tensor.device}, but input is on {device}")
    if isinstance(momentum := getattr(norm, "momentum", None), Tensor):
        if momentum.numel() != 1:
            raise ValueError(f"{prefix}momentum must have one element, got {momentum.numel()}")
        if momentum.device != device:
            raise RuntimeError(
                f"{prefix}momentum is on {momentum.device}, but input is on {device}"
            )


def check_statistics(norm: Any, prefix: str = "") -> None:
    """Raises for running statistics that evaluation needs and that are missing."""
    for name in ("running_mean", "running_var"):
        if getattr(norm, name) is None:
            raise RuntimeError(f"{prefix}{name} must be defined in evaluation mode")


def check_conv_bias(conv_weight: Tensor, conv_bias: Tensor | None) -> None:
    """Raises unless ``conv_bias`` has an element for each output channel, on the same device."""
    if conv_bias is None:
        return
    if conv_bias.shape != conv_weight.shape[:1]:
        raise ValueError(
            f"conv_bias must have the shape {tuple(conv_weight.shape[:1])}, "
            f"got {tuple(conv_bias.shape)}"
        )
    if conv_bias.device != conv_weight.device:
        raise RuntimeError(
            f"conv_bias is on {conv_bias.device}, but conv_weight is on {conv_weight.device}"
        )


def check_residual(residual: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises unless ``residual`` has the shape and the device of what it is added to."""
    if residual.shape != shape:
        raise ValueError(
            f"residual must have the shape of input, {tuple(shape)}, got {tuple(residual.shape)}"
        )
    if residual.device != device:
        raise RuntimeError(f"residual is on {residual.device}, but input is on {device}")
