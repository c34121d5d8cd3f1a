"""What a training run is asked to do."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from bnres.activations import resolve
from bnres.data import DATASETS
from bnres.models import MODELS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class TrainConfig:
    """One training run: SGD with Nesterov momentum and a one-cycle learning rate.

    Attributes:
        dataset: name of a data set.
        data: where it lies, if it comes with no package.
        checksum: compare CIFAR-10's files with their published checksums.
        workers: processes that decode an image folder.
        model: name of a model.
        fused: fused layers, or torch's own.
        act: activation of the model (None: the model's own).
        epochs: passes over the training images.
        batch_size: images a step, at least the two that batch norm needs.
        lr: greatest learning rate of the cycle.
        weight_decay: of weights, not of biases and norms.
        label_smoothing: of the training loss.
        shift: greatest random shift of a training image, in pixels.
        dtype: ``fp32``, or ``bf16`` or ``fp16`` for automatic mixed precision.
        device: torch's name of a device.
        channels_last: memory format of images and convolutions.
        seed: of the weights, the order and the shifts.
        resume: checkpoint to go on from.

    Raises:
        ValueError: for a value that is none of the possible ones; it names them.
    """

    dataset: str = "mnist5k"
    data: Path | None = None
    checksum: bool = True
    workers: int = 4
    model: str = "resnet18"
    fused: bool = True
    act: str | None = None
    epochs: int = 5
    batch_size: int = 64
    lr: float = 0.03
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    shift: int = 2
    dtype: str = "fp32"
    device: str = field(default_factory=default_device)
    channels_last: bool = True
    seed: int = 0
    resume: Path | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("dataset", self.dataset, DATASETS),
            ("model", self.model, MODELS),
            ("dtype", self.dtype, DTYPES),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.act is not None:
            resolve(self.act, None)
        for name, number, least in (
            ("epochs", self.epochs, 1),
            ("batch_size", self.batch_size, 2),
            ("shift", self.shift, 0),
            ("workers", self.workers, 0),
        ):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        if not self.lr > 0:
            raise ValueError(f"lr must be greater than 0, got {self.lr}")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device {self.device!r} can't be used: {reason}") from error
        if self.resume is not None and not self.resume.is_file():
            raise ValueError(f"resume: there is no file {str(self.resume)!r}")
