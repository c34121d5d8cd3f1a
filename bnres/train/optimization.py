"""Builds a run's optimiser, learning-rate schedule and initial weights."""

import torch
from torch import nn
from torch.optim import lr_scheduler

from bnres.train.config import TrainConfig

# A one-cycle schedule lowers the momentum by this number while the learning rate rises, and raises
# the momentum again while the learning rate falls.
MOMENTUM_FALL = 0.1
# Learning rate at the start of a warm-up, divided by the greatest learning rate.
WARMUP_START = 0.01


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Returns the optimiser. Biases and parameters of norms have no weight decay."""
    groups = parameter_groups(model, config.weight_decay)
    # A fused optimiser updates many parameters in one launch.
    fused = torch.device(config.device).type == "cuda" or None
    if config.optimizer == "sgd":
        momentum = config.momentum
        if config.dtype == "fp16":
            # If the gradients of the first step overflow, fused SGD skips the step, but leaves the
            # momentum uninitialised.
            fused = None
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=momentum, nesterov=momentum > 0, fused=fused
        )
    cls = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return cls(groups, lr=config.lr, fused=fused)


def make_schedule(
    config: TrainConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> lr_scheduler.LRScheduler:
    """Returns the learning-rate schedule, which advances after each step of the optimiser."""
    steps = config.epochs * steps_per_epoch
    if config.schedule == "one-cycle":
        return lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=config.lr,
            total_steps=steps,
            base_momentum=max(config.momentum - MOMENTUM_FALL, 0.0),
            max_momentum=config.momentum,
            cycle_momentum=config.optimizer == "sgd",
        )
    if config.schedule == "constant":
        return lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
    rise = min(round(config.warmup_epochs * steps_per_epoch), steps - 1)
    fall = lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(steps - rise, 1))
    if not rise:
        return fall
    return lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, WARMUP_START, total_iters=rise), fall],
        milestones=[rise],
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Divides a model's parameters into a group with weight decay and a group without it.

    Parameters of at most one dimension, such as biases and parameters of norms, have no decay.
    """
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def xavier_uniform(model: nn.Module) -> None:
    """Initialises the weights of convolutions and linear layers as the d2l.ai course does."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
