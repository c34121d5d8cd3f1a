"""Checkpoints: written whole or not at all, read without running code."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bnres.train.config import TrainConfig
from bnres.train.state import TrainState

FORMAT = 2
# What a run must share with the one that wrote its checkpoint; layers may be fused or stock.
IDENTITY = ("dataset", "model", "act")
SCHEDULE = ("epochs", "batch_size", "lr", "weight_decay", "dtype", "seed")
STATEFUL = ("model", "optimizer", "scheduler", "scaler")


def save_checkpoint(path: Path, state: TrainState, config: TrainConfig) -> None:
    """Writes ``path`` by way of a temporary file, so that a kill leaves the old one."""
    content = {
        "format": FORMAT,
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
        "epoch": state.epoch,
        "history": state.history,
        "torch_rng": torch.get_rng_state(),
        **{name: getattr(state, name).state_dict() for name in STATEFUL},
    }
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path, state: TrainState, config: TrainConfig) -> None:
    """Sets ``state`` to what ``path`` holds.

    Raises:
        ValueError: if the file is no checkpoint of bnres, is one of another model, data set or
            length, or has no epoch left; ``state`` is untouched then.
    """
    content = read_checkpoint(path)
    saved = content["config"]
    for name in IDENTITY:
        if saved[name] != getattr(config, name):
            raise ValueError(
                f"resume: {path} is a checkpoint of {name} {saved[name]!r}, "
                f"but {name} is {getattr(config, name)!r}"
            )
    for name in SCHEDULE:
        if saved[name] != getattr(config, name):
            raise ValueError(
                f"resume: {path} was trained with {name}={saved[name]}, which a run keeps to its "
                f"end, but {name} is {getattr(config, name)}"
            )
    if content["epoch"] >= config.epochs:
        raise ValueError(f"resume: {path} has all of its {config.epochs} epochs behind it")
    for name in STATEFUL:
        getattr(state, name).load_state_dict(content[name])
    torch.set_rng_state(content["torch_rng"])
    state.epoch, state.history = content["epoch"], content["history"]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Raises:
        ValueError: if the file is not a checkpoint that this version can read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"resume: {path} is not a checkpoint: {error}".splitlines()[0]) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"resume: {path} is not a checkpoint of bnres (format {FORMAT})")
    return content
