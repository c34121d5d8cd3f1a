"""What is wrong with a call's input, said clearly."""

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
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    prefix: str = "",
) -> None:
    """Raises for buffers and parameters that do not fit ``input``; ``prefix`` begins their names."""
    named = {
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
    }
    channels = input.shape[1]
    for name, tensor in named.items():
        if tensor is None:
            if not training and name.startswith("running"):
                raise RuntimeError(f"{prefix}{name} must be defined in evaluation mode")
            continue
        if tensor.numel() != channels:
            raise RuntimeError(
                f"{prefix}{name} should contain {channels} elements not {tensor.numel()}"
            )
        if tensor.device != input.device:
            raise RuntimeError(
                f"{prefix}{name} is on {tensor.device}, but input is on {input.device}"
            )


def check_beside(name: str, other: Tensor, input: Tensor) -> None:
    """Raises unless ``other`` has the shape and the device of ``input``."""
    if other.shape != input.shape:
        raise ValueError(
            f"{name} must have the shape of input, {tuple(input.shape)}, got {tuple(other.shape)}"
        )
    if other.device != input.device:
        raise RuntimeError(f"{name} is on {other.device}, but input is on {input.device}")
