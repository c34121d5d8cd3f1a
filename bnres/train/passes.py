"""Forward and backward of a batch: launched operation by operation, or as a CUDA graph."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnres.train.config import DTYPES, TrainConfig

# Batches that run as they are before one is captured: torch compiles, chooses and allocates in them.
WARMUP_BATCHES = 3


def autocast(config: TrainConfig) -> torch.autocast:
    """Automatic mixed precision as a run asks for it."""
    dtype = DTYPES[config.dtype]
    device_type = torch.device(config.device).type
    return torch.autocast(device_type, dtype, enabled=dtype != torch.float32)


class Passes:
    """Adds a batch's gradients to the model's.

    Args:
        forward: the net, compiled or parallel if that is asked for.
        scaler: of the loss.
        config: the run.
    """

    def __init__(self, forward: Any, scaler: torch.amp.GradScaler, config: TrainConfig) -> None:
        self.forward, self.scaler, self.config = forward, scaler, config

    def __call__(self, images: Tensor, labels: Tensor, share: int = 1) -> tuple[Tensor, Tensor]:
        """The loss, and how many images were classified right, on the device.

        Args:
            images, labels: the batch.
            share: batches that a step of the optimiser takes the mean of.
        """
        with autocast(self.config):
            logits = self.forward(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        self.scaler.scale(loss / share).backward()
        return loss.detach(), (logits.detach().argmax(1) == labels).sum()


class GraphedPasses(Passes):
    """The same, captured once in a CUDA graph and replayed: one launch from the host.

    The first whole batches run as they are; none is trained on twice. The smaller batch that an epoch
    may end in always runs as it is. The step of the optimiser is not part of the graph, since torch's
    SGD takes momentum as a number, which a one-cycle schedule changes from step to step; fused, it is
    a few launches.

    Args:
        model: whose gradients the graph writes. They have to be None at each call.
        forward, scaler, config: as those of `Passes`.
    """

    def __init__(
        self, model: nn.Module, forward: Any, scaler: torch.amp.GradScaler, config: TrainConfig
    ) -> None:
        super().__init__(forward, scaler, config)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.stream = torch.cuda.Stream(config.device)
        self.seen = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, images: Tensor, labels: Tensor, share: int = 1) -> tuple[Tensor, Tensor]:
        if len(images) < self.config.batch_size:
            return super().__call__(images, labels)
        if self.graph is None:
            if self.seen < WARMUP_BATCHES:
                self.seen += 1
                return self._warm_up(images, labels)
            self._capture(images, labels)
        return self._replay(images, labels)

    def _warm_up(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """On a stream that is not the default one, as what is captured runs."""
        current = torch.cuda.current_stream(images.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = super().__call__(images, labels)
        current.wait_stream(self.stream)
        return results

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.clone(), labels.clone()
        graph = torch.cuda.CUDAGraph()
        # Threads that bring batches may go on allocating.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self.results = super().__call__(self.images, self.labels)
        self.gradients = [p.grad for p in self.parameters]
        self.graph = graph

    def _replay(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        assert self.graph is not None
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        loss, correct = self.results
        return loss.clone(), correct.clone()
