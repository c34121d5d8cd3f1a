"""Batch norm modules. They are torch's classes with a forward that calls the fused operations."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bnres.activations import resolve
from bnres.nn.hooks import make_leaf
from bnres.nn.state import Norm, group_of, next_state, normalizes_by_batch
from bnres.operations.batch_norm_act import batch_norm_act
from bnres.operations.batch_norm_act_max_pool import (
    Size,
    batch_norm_act_max_pool2d,
)
from bnres.operations.sync_batch_norm_act import sync_batch_norm_act


def _run(bn: Norm, input: Tensor, **options: Any) -> Any:
    """Calls `sync_batch_norm_act` if ``bn`` is synchronised, otherwise `batch_norm_act`."""
    s, group = next_state(bn), group_of(bn)
    tensors = input, s.running_mean, s.running_var, s.weight, s.bias
    options |= {"momentum": s.momentum, "eps": s.eps, "num_batches_tracked": s.num_batches_tracked}
    if group is None:
        return batch_norm_act(*tensors, training=normalizes_by_batch(bn), **options)
    return sync_batch_norm_act(*tensors, process_group=group, **options)


class _FusedForward(Norm):
    """The base class of the batch norm modules.

    Users may change the training mode, momentum and eps, which are read at each call.
    """

    act: str | type[nn.Module] | None = None
    act_kwargs: dict[str, Any] | None = None
    synchronises = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        make_leaf(self)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        # torch, timm and apex have functions that replace batch norms by SyncBatchNorms, and would
        # drop the activation and the residual. These functions call named_children of each batch
        # norm, so the error can be raised here.
        if sys._getframe(1).f_code.co_name.startswith("convert_sync"):
            raise TypeError(
                f"module contains a {type(self).__name__}, whose activation and residual would be "
                "lost: convert it with bnres.convert_sync_batchnorm"
            )
        return super().named_children()

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        residual_norm: Norm | None = None,
        fork: bool = False,
    ) -> Any:
        self._check_input_dim(input)
        other = None
        if residual_norm is not None:
            if residual is not None:
                residual_norm._check_input_dim(residual)
            differ = normalizes_by_batch(residual_norm) != normalizes_by_batch(self) or group_of(
                residual_norm
            ) is not group_of(self)
            if residual is not None and differ:
                # One operation can't run both batch norms if only one of them normalises with the
                # statistics of the batch, or if their process groups differ.
                residual = _run(residual_norm, residual, act=None)
            else:
                other = next_state(residual_norm)
        return _run(
            self, input, residual=residual, residual_norm=other, act=self.act,
            act_kwargs=self.act_kwargs, fork=fork,
        )  # fmt: skip


class BatchNorm1d(_FusedForward, nn.BatchNorm1d):
    """Computes (x - mean) / sqrt(var + eps) * weight + bias on an input (N, C) or (N, C, L).

    The fused kernels compute the batch norm of `torch.nn.BatchNorm1d` (Ioffe and Szegedy, arXiv
    1502.03167).
    """


class BatchNorm2d(_FusedForward, nn.BatchNorm2d):
    """Computes (x - mean) / sqrt(var + eps) * weight + bias on an input (N, C, H, W).

    The fused kernels compute the batch norm of `torch.nn.BatchNorm2d` (Ioffe and Szegedy, arXiv
    1502.03167).
    """


class BatchNorm3d(_FusedForward, nn.BatchNorm3d):
    """Computes (x - mean) / sqrt(var + eps) * weight + bias on an input (N, C, D, H, W).

    The fused kernels compute the batch norm of `torch.nn.BatchNorm3d` (Ioffe and Szegedy, arXiv
    1502.03167).
    """


class _BatchNormAct(_FusedForward):
    """The base class of the batch norms with an activation."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        apply_act: bool = True,
        act_layer: str | type[nn.Module] | None = nn.ReLU,
        act_kwargs: dict[str, Any] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        resolve(act_layer, act_kwargs)
        self.act = act_layer if apply_act else None
        self.act_kwargs = act_kwargs if apply_act else None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={resolve(self.act, self.act_kwargs)[0]}"


class BatchNormAct1d(_BatchNormAct, nn.BatchNorm1d):
    """Computes act(bn(input) + residual) on (N, C) or (N, C, L), see `BatchNormAct2d`.

    The batch norm is that of `torch.nn.BatchNorm1d` (Ioffe and Szegedy, arXiv 1502.03167).
    """


class BatchNormAct2d(_BatchNormAct, nn.BatchNorm2d):
    """Computes act(bn(input) + residual) on an input (N, C, H, W), in one operation.

    The call is ``forward(input, residual=None, *, residual_norm=None, fork=False)``. With a second
    batch norm module as ``residual_norm``, the call returns
    act(bn(input) + residual_norm(residual)). With ``fork`` the call returns its result as two
    tensors, as `bnres.functional.batch_norm_act` explains.

    The constructor has the arguments of timm's class of the same name, except inplace and
    drop_layer. ``act_layer`` is the name or the torch class of an activation; None means no
    activation.

    Raises:
        ValueError: for an unknown activation or option.

    The batch norm is that of `torch.nn.BatchNorm2d` (Ioffe and Szegedy, arXiv 1502.03167).
    """


class BatchNormAct3d(_BatchNormAct, nn.BatchNorm3d):
    """Computes act(bn(input) + residual) on (N, C, D, H, W), see `BatchNormAct2d`.

    The batch norm is that of `torch.nn.BatchNorm3d` (Ioffe and Szegedy, arXiv 1502.03167).
    """


class BatchNormActMaxPool2d(BatchNormAct2d):
    """Computes max_pool2d(act(bn(input))), as in the stem of a ResNet, in one operation.

    The input is (N, C, H, W). With ``fork``, ``forward`` returns the result as two tensors.

    ``kernel_size``, ``stride``, ``padding``, ``dilation`` and ``ceil_mode`` are as in
    `torch.nn.MaxPool2d`. The other arguments and the keys of the state dict are as in
    `BatchNormAct2d`.

    Raises:
        ValueError: for an unknown activation or option.

    The batch norm and the max-pool are those of `torch.nn.BatchNorm2d` (Ioffe and Szegedy, arXiv
    1502.03167) and `torch.nn.MaxPool2d`. The stem is from He et al., arXiv 1512.03385.
    """

    def __init__(
        self,
        num_features: int,
        kernel_size: Size = 3,
        stride: Size | None = None,
        padding: Size = 0,
        dilation: Size = 1,
        ceil_mode: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_features, **options)
        self.kernel_size, self.padding, self.dilation = kernel_size, padding, dilation
        self.stride = kernel_size if stride is None else stride
        self.ceil_mode = ceil_mode

    def forward(self, input: Tensor, *, fork: bool = False) -> Any:  # type: ignore[override]
        self._check_input_dim(input)
        return batch_norm_act_max_pool2d(
            input, kernel_size=self.kernel_size, stride=self.stride, padding=self.padding,
            dilation=self.dilation, ceil_mode=self.ceil_mode, act=self.act,
            act_kwargs=self.act_kwargs, training=normalizes_by_batch(self), fork=fork,
            **next_state(self)._asdict(),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, ceil_mode={self.ceil_mode}"
        )
