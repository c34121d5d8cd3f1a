"""Compares steps of two models: outputs, gradients and buffers."""

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.tolerances import assert_close


def outcome(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Returns the outputs and gradients of a call, and the buffers after the call.

    The parameters' gradients and the buffers are sorted by name.
    """
    x = x.clone().requires_grad_()
    outputs = tree_leaves(model(x))
    gradients: list[Tensor] = []
    if torch.is_grad_enabled():
        # The gradient of each output has evenly spaced values from -1 to 1.
        dys = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device) for y in outputs]
        loss = sum((y.flatten() * dy).sum() for y, dy in zip(outputs, dys, strict=True))
        inputs = [x, *(p for _, p in sorted(model.named_parameters()))]
        found = torch.autograd.grad(loss, inputs, allow_unused=True)
        gradients = [g for g in found if g is not None]
    return [*outputs, *gradients, *(b.clone() for _, b in sorted(model.named_buffers()))]


def assert_same_steps(
    ours: nn.Module, theirs: nn.Module, x: Tensor, dtype: torch.dtype = torch.float64
) -> None:
    """Asserts equal outputs, gradients and buffers of both models, in training and evaluation."""
    for training in (True, False):
        found = [outcome(model.train(training), x) for model in (ours, theirs)]
        for actual, expected in zip(*found, strict=True):
            assert actual.dtype == expected.dtype
            assert_close(actual, expected, dtype)
