"""Batch norm modules: torch's own classes with a forward through the fused operations."""

from typing import Any

import torch
from torch import Tensor, nn

from bnres.activations import resolve
from bnres.functional import batch_norm_act


class _FusedForward(nn.modules.batchnorm._BatchNorm):
    """The forward of torch's `_BatchNorm`, with a residual and an activation in one operation."""

    act: str | type[nn.Module] | None = None
    act_kwargs: dict[str, Any] | None = None

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = self.num_batches_tracked.to(torch.float64).reciprocal()
        tracked = not self.training or self.track_running_stats
        return batch_norm_act(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            residual=residual,
            act=self.act,
            act_kwargs=self.act_kwargs,
            training=self.training or (self.running_mean is None and self.running_var is None),
            momentum=momentum,
            eps=self.eps,
        )


class BatchNorm1d(_FusedForward, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on (N, C) or (N, C, L), through the fused kernels."""


class BatchNorm2d(_FusedForward, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on (N, C, H, W), through the fused kernels."""


class BatchNorm3d(_FusedForward, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on (N, C, D, H, W), through the fused kernels."""


class _BatchNormAct(_FusedForward):
    """Batch norm, an optional residual and an activation in one operation.

    ``forward(input, residual=None)`` is act(bn(input) + residual). The arguments are those of
    timm's `BatchNormAct2d` but for its inplace and drop_layer; ``act_layer`` is a name, a torch class, or None for no activation.

    Raises:
        ValueError: for an unknown activation or option.
    """

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
    __doc__ = _BatchNormAct.__doc__


class BatchNormAct2d(_BatchNormAct, nn.BatchNorm2d):
    __doc__ = _BatchNormAct.__doc__


class BatchNormAct3d(_BatchNormAct, nn.BatchNorm3d):
    __doc__ = _BatchNormAct.__doc__
