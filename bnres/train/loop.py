"""One epoch of training, one pass of evaluation."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnres.train.config import DTYPES, TrainConfig
from bnres.train.state import AnyBatches, TrainState


@dataclass(frozen=True)
class TrainResult:
    """Means over the images of one epoch, its time in seconds, and the loss of each step."""

    loss: float
    accuracy: float
    seconds: float
    images_per_second: float
    step_losses: list[float]


def _autocast(config: TrainConfig) -> torch.autocast:
    dtype = DTYPES[config.dtype]
    device_type = torch.device(config.device).type
    return torch.autocast(device_type, dtype, enabled=dtype != torch.float32)


def train_epoch(
    state: TrainState,
    batches: AnyBatches,
    config: TrainConfig,
    on_step: Callable[[], None] = lambda: None,
) -> TrainResult:
    """Trains for one epoch; the losses stay on the device until its end."""
    state.model.train()
    losses: list[Tensor] = []
    correct: list[Tensor] = []
    start = time.perf_counter()
    for images, labels in batches.train(state.epoch):
        state.optimizer.zero_grad(set_to_none=True)
        with _autocast(config):
            logits = state.model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        state.scaler.scale(loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.scheduler.step()
        losses.append(loss.detach())
        correct.append((logits.detach().argmax(1) == labels).sum())
        on_step()
    step_losses = torch.stack(losses).tolist()
    images_seen = len(batches) * batches.batch_size
    accuracy = torch.stack(correct).sum().item() / images_seen
    seconds = time.perf_counter() - start
    state.epoch += 1
    return TrainResult(
        loss=sum(step_losses) / len(step_losses),
        accuracy=accuracy,
        seconds=seconds,
        images_per_second=images_seen / seconds,
        step_losses=step_losses,
    )


@torch.no_grad()
def evaluate(model: nn.Module, batches: AnyBatches, config: TrainConfig) -> tuple[float, float]:
    """Mean loss and accuracy on the held-out images, in eval mode."""
    model.eval()
    loss, correct = torch.zeros((), device=config.device), torch.zeros((), device=config.device)
    for images, labels in batches.test():
        with _autocast(config):
            logits = model(images).float()
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    count = batches.test_count
    return loss.item() / count, correct.item() / count
