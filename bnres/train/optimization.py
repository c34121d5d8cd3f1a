"""torch's optimisers and schedules, as a run asks for them."""

import torch
from torch import nn
from torch.optim import lr_scheduler

from bnres.train.config import TrainConfig

# In a one-cycle schedule momentum falls by this while the learning rate rises, and comes back.
MOMENTUM_FALL = 0.1
# Where a rising schedule begins, as a share of the greatest learning rate.
WARMUP_START = 0.01


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser; weights decay, biases and norms do not."""
    groups = parameter_groups(model, config.weight_decay)
    # One launch for many parameters.
    fused = torch.device(config.device).type == "cuda" or None
    if config.optimizer == "sgd":
        momentum = config.momentum
        if config.dtype == "fp16":
            fused = None  # a first step that overflows would leave it momentum out of thin air
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=momentum, nesterov=momentum > 0, fused=fused
        )
    cls = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return cls(groups, lr=config.lr, fused=fused)


def make_schedule(
    config: TrainConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> lr_scheduler.LRScheduler:
    """The schedule of the learning rate, by steps of the optimiser."""
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
    """Weights with decay; biases and norms, which have one dimension, without."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def xavier_uniform(model: nn.Module) -> None:
    """The d2l.ai course's initial weights of convolutions and linear layers."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
