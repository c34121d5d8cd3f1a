"""NVIDIA apex's fused batch norm for channels_last fp16 tensors (``apex.contrib.groupbn``).

This code has not run on a GPU yet. The benchmark checks its results before it times them.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import OpCase
from benchmarks.operations import EPS, MOMENTUM, Inputs
from benchmarks.providers.base import (
    Bind,
    Implementation,
    Provider,
    Results,
    Unavailable,
    needs_training_norm,
)

CHANNELS = 4


def _prepare(case: OpCase) -> Bind:
    needs_training_norm(case)
    if case.dtype == "fp32" or case.layout != "channels_last":
        raise Unavailable("only supports fp16 channels_last tensors")
    if not torch.cuda.is_available():
        raise Unavailable("needs a GPU")
    try:
        module = importlib.import_module("apex.contrib.groupbn.batch_norm")
        kernels, layer = module.bnp, module.BatchNorm2d_NHWC
    except Exception as error:  # PyPI's apex is another package, and may raise anything
        raise Unavailable(
            f"NVIDIA apex, built with APEX_BNP=1, can't be imported: {error}"
        ) from error
    has_relu = case.site.operation != "bn"

    def bind(inputs: Inputs) -> Implementation:
        channels = inputs.x.shape[1]
        if channels % CHANNELS:
            raise Unavailable(f"only supports multiples of {CHANNELS} channels, got {channels}")
        plan = layer(channels, fuse_relu=has_relu, bn_group=1).to(inputs.x.device)
        if inputs.residual is None:
            return _norm(kernels, plan, inputs, has_relu)
        return _norm_add_relu(kernels, plan, inputs)

    return bind


def _nhwc(t: Tensor) -> Tensor:
    return t.detach().permute(0, 2, 3, 1)


def _nchw(t: Tensor) -> Tensor:
    return t.permute(0, 3, 1, 2)


def _state(plan: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    norm = inputs.norm
    return (
        norm.weight.detach(),
        norm.bias.detach(),
        *norm.buffers,
        plan.minibatch_mean,
        plan.minibatch_riv,
    )


def _norm(kernels: Any, plan: Any, inputs: Inputs, has_relu: bool) -> Implementation:
    """Implements batch norm, followed by ReLU if ``has_relu``."""
    x, state = _nhwc(inputs.x), _state(plan, inputs)
    options = (plan.ret_cta, MOMENTUM, EPS, has_relu, None, None, None, None, 1, plan.magic)
    grid = (plan.fwd_occupancy, plan.fwd_grid_dim_x)
    backward_grid = (plan.bwd_occupancy, plan.bwd_grid_dim_x)
    ran_forward = False

    def forward() -> Results:
        nonlocal ran_forward
        ran_forward = True
        return (_nchw(kernels.bn_fwd_nhwc(x, *state, *options, *grid, False)),)

    def backward() -> Results:
        if not ran_forward:
            forward()  # This stores the statistics that backward reads.
        dy = _nhwc(inputs.gradients[0])
        dx, dweight, dbias = kernels.bn_bwd_nhwc(x, dy, *state, *options, *backward_grid, False)
        return _nchw(dx), dweight, dbias

    return Implementation(forward, backward)


def _norm_add_relu(kernels: Any, plan: Any, inputs: Inputs) -> Implementation:
    """Implements batch norm, addition and ReLU. Stores one bit per element for backward."""
    assert inputs.residual is not None
    x, residual = _nhwc(inputs.x), _nhwc(inputs.residual)
    words = (x.numel() + 31) // 32 * 2 * plan.grid_dim_y
    mask = torch.empty(words, dtype=torch.int32, device=x.device)
    options = (mask, plan.ret_cta, MOMENTUM, EPS, None, None, None, None, 1, plan.magic)
    arguments = (*_state(plan, inputs), *options)
    grid = (plan.addrelu_fwd_occupancy, plan.addrelu_fwd_grid_dim_x)
    backward_grid = (plan.addrelu_bwd_occupancy, plan.addrelu_bwd_grid_dim_x)
    ran_forward = False

    def forward() -> Results:
        nonlocal ran_forward
        ran_forward = True
        return (_nchw(kernels.bn_addrelu_fwd_nhwc(x, residual, *arguments, *grid, False)),)

    def backward() -> Results:
        if not ran_forward:
            forward()  # This stores the statistics and the mask that backward reads.
        dy = _nhwc(inputs.gradients[0])
        dx, dresidual, dweight, dbias = kernels.bn_addrelu_bwd_nhwc(
            x, dy, *arguments, *backward_grid, False
        )
        return _nchw(dx), dweight, dbias, _nchw(dresidual)

    return Implementation(forward, backward)


APEX = Provider("apex", _prepare, dtype="fp16")
