"""Checks an operation's arguments and converts them to what the kernels accept."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from bnres.kernels.dtypes import SUPPORTED_DTYPES
from bnres.kernels.layout import dense, dense_like
from bnres.kernels.torch_internals import mapped_levels


def check_input(input: Tensor, training: bool, name: str = "input") -> None:
    """Raises an error unless ``input`` is a valid input of a batch norm."""
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
    """Raises an error unless ``norm``, a `BatchNormState`, fits ``channels`` and ``device``.

    Error messages put ``prefix`` before the names of the fields of ``norm``.
    """
    for name in ("running_mean", "running_var", "weight", "bias", "input_bias"):
        tensor = getattr(norm, name)
        if tensor is None:
            if name.startswith("running") and not training:
                raise RuntimeError(f"{prefix}{name} must be defined in evaluation mode")
            continue
        if tensor.numel() != channels:
            raise RuntimeError(
                f"{prefix}{name} should contain {channels} elements not {tensor.numel()}"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{prefix}{name} must be of a floating dtype, got {tensor.dtype}")
        _check_device(f"{prefix}{name}", tensor, device)
    for name in ("momentum", "num_batches_tracked"):
        scalar = getattr(norm, name)
        if isinstance(scalar, Tensor) and scalar.numel() != 1:
            raise ValueError(f"{prefix}{name} must have one element, got {scalar.numel()}")
    if isinstance(norm.momentum, Tensor):
        _check_device(f"{prefix}momentum", norm.momentum, device)


def _check_device(name: str, t: Tensor, device: torch.device, other: str = "input") -> None:
    if t.device != device:
        raise RuntimeError(f"{name} is on {t.device}, but {other} is on {device}")


def check_mapped(x: Tensor, norm: Any) -> None:
    """Raises an error if `torch.vmap` maps over ``x`` but not over the running statistics.

    Each running statistic would then get several values, one per mapped input.
    """
    if is_compiling() or not (levels := mapped_levels(x)):
        return
    for buffer in (norm.running_mean, norm.running_var):
        if buffer is not None and levels - mapped_levels(buffer):
            # Here F.batch_norm raises torch's own error, before any buffer is written to.
            F.batch_norm(x, norm.running_mean, norm.running_var, training=True)


def check_conv_bias(conv_weight: Tensor, conv_bias: Tensor | None) -> None:
    """Raises an error unless ``conv_weight`` is 4-D and ``conv_bias`` has one value per filter.

    ``conv_bias`` may also be None.
    """
    if conv_weight.dim() != 4:
        raise ValueError(f"expected 4D conv_weight (got {conv_weight.dim()}D conv_weight)")
    if conv_bias is None:
        return
    if conv_bias.shape != conv_weight.shape[:1]:
        raise ValueError(
            f"conv_bias must have the shape {tuple(conv_weight.shape[:1])}, "
            f"got {tuple(conv_bias.shape)}"
        )
    _check_device("conv_bias", conv_bias, conv_weight.device, "conv_weight")


def check_residual(residual: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises an error unless ``residual`` has the given shape and is on the given device."""
    if residual.shape != shape:
        raise ValueError(
            f"residual must have the shape {tuple(shape)}, got {tuple(residual.shape)}"
        )
    _check_device("residual", residual, device)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether gradients are enabled and at least one of these tensors requires a gradient."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def as_kernels_take(inputs: Any) -> Any:
    """Returns the inputs in the form that the kernels accept, copied where necessary.

    x and the residual get the same dtype and the same memory format, contiguous or channels_last.
    All other tensors become contiguous and one-dimensional.
    """
    x, residual = inputs.x, inputs.residual
    if residual is not None and residual.dtype != x.dtype:
        # Under autocast x and the residual may have different dtypes.
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    x = dense(x)
    if residual is not None:
        # torch.compile does not accept one tensor as two arguments, so a view replaces a residual
        # that is x itself.
        residual = x.view_as(x) if residual is x else dense_like(residual, x)
    others = {
        name: packed(t) for name, t in inputs._asdict().items() if name not in ("x", "residual")
    }
    return inputs._replace(x=x, residual=residual, **others)


def packed(t: Tensor | None) -> Tensor | None:
    """Returns ``t``, which has one value per channel, as a contiguous 1-D tensor."""
    if t is None or (t.dim() == 1 and t.is_contiguous()):
        return t
    return t.reshape(-1).contiguous()


def counted(counter: Tensor | None, x: Tensor) -> Tensor | None:
    """Returns ``counter`` (num_batches_tracked) if the kernels can increment it.

    Otherwise ``counter`` is incremented here, and the result is None.
    """
    if counter is None or (counter.dtype == torch.int64 and counter.device == x.device):
        return counter
    counter.add_(1)
    return None


def packed_buffers(buffers: Any, x: Tensor) -> Any:
    """Returns the buffers as contiguous tensors, and each counter as `counted` returns it."""
    return type(buffers)(
        *(
            counted(t, x) if name.endswith("counter") else None if t is None else t.contiguous()
            for name, t in buffers._asdict().items()
        )
    )


def copy_back(buffers: Any, packed: Any, names: Sequence[str]) -> None:
    """Copies values back from ``packed`` to the buffers that `packed_buffers` had copied.

    Training wrote to these copies. ``names`` are the buffers that training can write to.
    """
    for name in names:
        buffer, copy = getattr(buffers, name), getattr(packed, name)
        if buffer is not None and copy is not None and copy is not buffer:
            buffer.copy_(copy)


def as_dtype_of(t: Tensor, computed: Tensor) -> Tensor:
    """Returns ``computed`` in the dtype of ``t``.

    `torch.Tensor.to` takes time even if it changes nothing, so it is called only if the dtypes
    differ.
    """
    return computed if computed.dtype == t.dtype else computed.to(t.dtype)
