"""Defines presets, which are named sets of options.

Options that a preset does not set have the defaults of `TrainConfig`.
"""

from typing import Any

_CIFAR = {"dataset": "cifar10", "model": "resnet18", "stem": "cifar"}
_IMAGENET: dict[str, Any] = {
    # Similar to torchvision's reference training. The differences include the cosine schedule with
    # warm-up, Nesterov momentum, label smoothing, and no weight decay of biases and norms.
    "dataset": "folder",
    "epochs": 90,
    "batch_size": 256,
    "momentum": 0.9,
    "schedule": "cosine",
    "lr": 0.1,
    "warmup_epochs": 5.0,
    "weight_decay": 1e-4,
    "flip": True,
    "crop_size": 224,
    "dtype": "bf16",
}

PRESETS: dict[str, dict[str, Any]] = {
    "mnist5k": {"dataset": "mnist5k"},
    # The training run of the d2l.ai course.
    "seed-cifar10": {
        "dataset": "cifar10",
        "model": "resnet18-seed-cifar",
        "init": "xavier",
        "epochs": 10,
        "batch_size": 256,
        "drop_last": False,
        "optimizer": "adam",
        "schedule": "constant",
        "lr": 1e-3,
        "weight_decay": 0.0,
        "label_smoothing": 0.0,
        "shift": 0,
        "flip": True,
        "normalize": False,
    },
    # The aim is an accuracy of 94%, or 96% with --epochs 60. The accuracy is not measured yet.
    "cifar10-fast": {
        **_CIFAR,
        "epochs": 15,
        "batch_size": 512,
        "momentum": 0.95,
        "lr": 0.4,
        "shift": 4,
        "flip": True,
        "dtype": "bf16",
    },
    "imagenet-resnet18": {**_IMAGENET, "model": "resnet18"},
    "imagenet-resnet50": {**_IMAGENET, "model": "resnet50"},
}


def preset(name: str) -> dict[str, Any]:
    """Returns the options that a preset sets."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
