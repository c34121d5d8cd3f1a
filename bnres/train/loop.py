"""One epoch of training, one pass of evaluation."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnres.data import EpochBatches
from bnres.train.config import TrainConfig
from bnres.train.distributed import World
from bnres.train.passes import autocast
from bnres.train.state import TrainState

# Batches between looks at the loss, which wait for the device.
LOOK_EVERY = 50


class NonFiniteLoss(RuntimeError):
    """The loss is no number any more."""


@dataclass(frozen=True)
class TrainResult:
    """Means over an epoch's batches and images, its times in seconds, and the loss of each batch.

    Attributes:
        seconds: of the batches trained in this process.
        wait_seconds: of these, the wait for the next batch.
        images_per_second: the wait included.
    """

    loss: float
    accuracy: float
    seconds: float
    wait_seconds: float
    images_per_second: float
    step_losses: list[float]

    @property
    def images_per_second_without_wait(self) -> float:
        return self.images_per_second * self.seconds / max(self.seconds - self.wait_seconds, 1e-9)


def train_epoch(
    state: TrainState,
    batches: EpochBatches,
    config: TrainConfig,
    on_batch: Callable[[], None] = lambda: None,
) -> TrainResult:
    """Trains to the end of the epoch, from the batch that the state stands at.

    Losses stay on the device; every so often one is looked at.

    Args:
        state: what is trained.
        batches: the data.
        config: the run.
        on_batch: called behind each batch, the state being one that can be saved if no gradients
            are being added up.

    Raises:
        NonFiniteLoss: if a loss is infinite or no number; the state is at the batch behind it.
    """
    state.forward.train()
    images_seen, waited = 0, 0.0
    start = asked = time.perf_counter()
    first = state.batch
    for images, labels in batches.train(state.epoch, first):
        waited += time.perf_counter() - asked
        train_batch(state, images, labels, config, len(batches))
        images_seen += len(labels) * state.world.size
        if state.batch % LOOK_EVERY == 0 or state.batch == len(batches):
            look(state)
        on_batch()
        asked = time.perf_counter()
    world = state.world
    step_losses = (world.sum(torch.stack(state.losses)) / world.size).tolist()
    correct = world.sum(torch.stack(state.correct).sum())
    accuracy = correct.item() / batches.images_per_epoch
    seconds = time.perf_counter() - start
    state.epoch += 1
    state.batch = 0
    state.losses, state.correct = [], []
    return TrainResult(
        loss=sum(step_losses) / len(step_losses),
        accuracy=accuracy,
        seconds=seconds,
        wait_seconds=waited,
        images_per_second=images_seen / seconds,
        step_losses=step_losses,
    )


def train_batch(
    state: TrainState, images: Tensor, labels: Tensor, config: TrainConfig, batches: int
) -> None:
    """Forward and backward of a batch, and a step behind every ``config.accumulate`` of them.

    Args:
        state: what is trained.
        images, labels: the batch.
        config: the run.
        batches: how many an epoch has.
    """
    if state.batch % config.accumulate == 0:
        state.optimizer.zero_grad(set_to_none=True)
    done = state.batch % config.accumulate
    group = min(config.accumulate, batches - state.batch + done)
    steps = done + 1 == group
    # Processes exchange gradients once a step.
    alone = state.world.size > 1 and not steps
    with state.forward.no_sync() if alone else nullcontext():
        loss, correct = state.passes(images, labels, group)
    state.batch += 1
    if steps:
        if config.clip_norm is not None:
            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.scheduler.step()
        if state.average is not None:
            state.average.update_parameters(state.model)
    state.losses.append(loss)
    state.correct.append(correct)


def look(state: TrainState) -> None:
    """Raises `NonFiniteLoss` if one of the last losses, in any process, is no number."""
    recent = state.world.sum(torch.stack(state.losses[-LOOK_EVERY:])) / state.world.size
    wrong = (~recent.isfinite()).nonzero()
    if len(wrong):
        batch = len(state.losses) - len(recent) + int(wrong[0])
        raise NonFiniteLoss(
            f"the loss of epoch {state.epoch + 1}, batch {batch + 1} is {recent[wrong[0]].item()}"
        )


@torch.no_grad()
def evaluate(
    model: Any, batches: EpochBatches, config: TrainConfig, world: World | None = None
) -> tuple[float, float]:
    """Mean loss and accuracy on the held-out images, in eval mode.

    Several processes take a part each, of equal length or not, and add up.
    """
    world = world or World()
    model.eval()
    loss, correct = torch.zeros((), device=config.device), torch.zeros((), device=config.device)
    for images, labels in batches.test():
        with autocast(config):
            logits = model(images).float()
            if config.eval_flip:
                logits = (logits + model(images.flip(-1)).float()) / 2
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    loss, correct = world.sum(torch.stack((loss, correct))).tolist()
    return loss / batches.test_count, correct / batches.test_count
