"""Runs forward and backward of a batch, operation by operation or as one CUDA graph."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnres.train.config import DTYPES, TrainConfig

# Number of batches that run before a batch is captured in a CUDA graph. In these batches torch
# compiles code and selects algorithms, which is impossible during a capture.
WARMUP_BATCHES = 3


def autocast(config: TrainConfig) -> torch.autocast:
    """Returns a context for mixed precision in the run's dtype. With fp32 it has no effect."""
    dtype = DTYPES[config.dtype]
    device_type = torch.device(config.device).type
    return torch.autocast(device_type, dtype, enabled=dtype != torch.float32)


class Passes:
    """Runs forward and backward of a batch. Backward adds to the gradients of the parameters.

    ``forward`` is the model, possibly compiled or wrapped in DistributedDataParallel.
    """

    def __init__(self, forward: Any, scaler: torch.amp.GradScaler, config: TrainConfig) -> None:
        self.forward, self.scaler, self.config = forward, scaler, config

    def __call__(self, images: Tensor, labels: Tensor, share: int = 1) -> tuple[Tensor, Tensor]:
        """Returns the loss and the number of correctly classified images, as tensors on the device.

        Args:
            images, labels: the batch.
            share: number of batches whose gradients are averaged for the next step of the
                optimiser. Before backward, the loss is divided by this number.
        """
        with autocast(self.config):
            logits = self.forward(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        self.scaler.scale(loss / share).backward()
        return loss.detach(), (logits.detach().argmax(1) == labels).sum()


class GraphedPasses(Passes):
    """Captures forward and backward in a CUDA graph, which later calls replay in one launch.

    The first ``WARMUP_BATCHES`` full batches, and all batches that are not full, run without the
    graph.

    The graph does not contain the optimiser's step. A one-cycle schedule changes the momentum at
    each step, but torch's SGD stores it as a Python number, which a graph would never update.

    The gradients of the model's parameters must be None before each call.
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
        """Runs a batch on the stream on which the graph is captured later."""
        current = torch.cuda.current_stream(images.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = super().__call__(images, labels)
        current.wait_stream(self.stream)
        return results

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.clone(), labels.clone()
        graph = torch.cuda.CUDAGraph()
        # With "thread_local", threads that load batches may allocate memory during the capture.
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
