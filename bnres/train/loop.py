"""Trains for one epoch, and evaluates on the held-out set."""

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

# Number of batches between two checks of the losses. At each check the host waits for the device.
LOOK_EVERY = 50


class NonFiniteLoss(RuntimeError):
    """Raised when the training loss is infinite or NaN."""


@dataclass(frozen=True)
class TrainResult:
    """The results of training for one epoch.

    Attributes:
        loss: mean loss of the batches.
        accuracy: fraction of the training images that were classified correctly.
        seconds: duration of the training in seconds. If the run was resumed within this epoch, only
            the time since then counts.
        wait_seconds: the part of ``seconds`` in which training waited for the next batch.
        images_per_second: images that all processes together trained on per second.
        step_losses: the loss of each batch of the epoch.
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
    """Trains from batch ``state.batch`` to the end of the epoch.

    Args:
        state: the state of the run. It is updated.
        batches: the data.
        config: the options of the run.
        on_batch: called after each batch. Checkpoints do not store gradients, so it may save a
            checkpoint only after a step of the optimiser (see `train_batch`).

    Raises:
        NonFiniteLoss: if the loss of a batch is infinite or NaN.
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
    """Runs forward and backward of a batch, and then a step of the optimiser if one is due.

    A step is due after every ``config.accumulate`` batches, and after the last batch of an epoch.
    ``batches`` is the number of batches in an epoch.
    """
    if state.batch % config.accumulate == 0:
        state.optimizer.zero_grad(set_to_none=True)
    done = state.batch % config.accumulate
    group = min(config.accumulate, batches - state.batch + done)
    steps = done + 1 == group
    # Processes exchange gradients once for each step of the optimiser, not for each batch.
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
    """Raises `NonFiniteLoss` if one of the last ``LOOK_EVERY`` losses is infinite or NaN.

    Every process must call this function, because the losses are averaged over the processes.
    """
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
    """Puts the model into eval mode, and returns its mean loss and accuracy on the held-out images.

    Each process evaluates a part of the images. The results are over all images.
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
