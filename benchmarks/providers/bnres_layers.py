"""Provides the operations of `bnres.functional`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import OpCase
from benchmarks.operations import EPS, MOMENTUM, POOL, Inputs
from benchmarks.providers.base import Bind, Implementation, Provider, Unavailable, by_autograd
from benchmarks.sites import ConvSite
from bnres import functional, use_conv_route
from bnres.backend import backend


def _function(case: OpCase) -> Callable[[Inputs], tuple[Tensor, ...]]:
    site, training = case.site, case.direction != "eval"
    options: dict[str, Any] = {"training": training, "momentum": MOMENTUM, "eps": EPS}
    operation = site.operation

    def batch_norm(inputs: Inputs) -> tuple[Tensor, ...]:
        norm, fork = inputs.norm, operation.endswith("fork")
        y = functional.batch_norm_act(
            inputs.x, *norm.buffers, norm.weight, norm.bias, residual=inputs.residual,
            act=None if operation == "bn" else "relu", fork=fork, **options,
        )  # fmt: skip
        return y if fork else (y,)

    def dual(inputs: Inputs) -> tuple[Tensor, ...]:
        norm, other = inputs.norm, inputs.residual_norm
        assert inputs.residual is not None and other is not None
        state = functional.BatchNormState(*other.buffers, other.weight, other.bias, MOMENTUM, EPS)
        y = functional.batch_norm_act(
            inputs.x, *norm.buffers, norm.weight, norm.bias, residual=inputs.residual,
            residual_norm=state, **options,
        )  # fmt: skip
        return (y,)

    def max_pool(inputs: Inputs) -> tuple[Tensor, ...]:
        norm = inputs.norm
        kernel, stride, padding = POOL
        y = functional.batch_norm_act_max_pool2d(
            inputs.x, *norm.buffers, norm.weight, norm.bias, kernel_size=kernel, stride=stride,
            padding=padding, **options,
        )  # fmt: skip
        return (y,)

    def convolution(inputs: Inputs) -> tuple[Tensor, ...]:
        assert isinstance(site, ConvSite) and inputs.filter is not None
        norm, window = inputs.norm, site.window
        y = functional.conv2d_batch_norm_act(
            inputs.x, inputs.filter, None, *norm.buffers, norm.weight, norm.bias,
            stride=(window.stride_h, window.stride_w),
            padding=(window.padding_h, window.padding_w), residual=inputs.residual, **options,
        )  # fmt: skip
        return (y,)

    if isinstance(site, ConvSite):
        return convolution
    special = {"dual_bn_add_relu": dual, "bn_relu_pool": max_pool}
    return special.get(operation, batch_norm)


def _bnres(case: OpCase) -> Bind:
    function = _function(case)
    return lambda inputs: by_autograd(function, inputs, f"backend {backend(inputs.x.device)}")


def _conv_kernel(case: OpCase) -> Bind:
    if not isinstance(case.site, ConvSite):
        raise Unavailable("only supports convolutions")
    if not torch.cuda.is_available():
        raise Unavailable("needs a GPU")
    function = _function(case)

    def forced(inputs: Inputs) -> tuple[Tensor, ...]:
        with use_conv_route("kernel"):
            return function(inputs)

    def bind(inputs: Inputs) -> Implementation:
        return by_autograd(forced, inputs, "our convolution kernel, regardless of the routes table")

    return bind


BNRES = Provider("bnres", _bnres)
BNRES_CONV_KERNEL = Provider("bnres-conv-kernel", _conv_kernel)
