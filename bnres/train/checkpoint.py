"""Checkpoints: written whole or not at all, read without running code."""

import os
from pathlib import Path
from typing import Any

import torch

from bnres.train.config import TrainConfig
from bnres.train.state import TrainState

FORMAT = 3
# What a run that goes on may do otherwise than the one that wrote its checkpoint; layers may be
# fused or stock.
FREE = (
    "fused", "device", "data", "checksum", "workers", "compile", "cuda_graphs", "deterministic",
    "eval_flip", "checkpoint_steps", "tensorboard", "resume",
)  # fmt: skip
STATEFUL = ("model", "optimizer", "scheduler", "scaler")


# What the data of a run that goes on must be like.
OF_DATA = ("classes", "channels", "train_count")
KEYS = (
    "config", "epoch", "batch", "losses", "correct", "best", "history", "torch_rng", "cuda_rng",
    "average", "size", "processes", *OF_DATA, *STATEFUL,
)  # fmt: skip


def save_checkpoint(path: Path, state: TrainState, config: TrainConfig) -> None:
    """Writes ``path`` by way of a temporary file, so that a kill leaves the old one.

    Every process of a run calls it, and the first one writes.
    """
    empty = torch.zeros(0)
    losses, correct = (
        state.world.sum(torch.stack(values)) if values else empty
        for values in (state.losses, state.correct)
    )
    if not state.world.is_first:
        return
    device = torch.device(config.device)
    content = {
        "format": FORMAT,
        "config": config.as_dict(),
        "epoch": state.epoch,
        "batch": state.batch,
        "losses": losses,
        "correct": correct,
        "best": state.best,
        "size": state.size,
        "processes": state.world.size,
        **{name: getattr(state, name) for name in OF_DATA},
        "history": state.history,
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "average": None if state.average is None else state.average.state_dict(),
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
        ValueError: if the file is no checkpoint of bnres, is one of a run with other options than
            ``config`` has, other data or another number of processes, or has no epoch left;
            ``state`` is untouched then.
    """
    content = read_checkpoint(path)
    check_same_run(path, content["config"], config.as_dict())
    found = {name: getattr(state, name) for name in OF_DATA} | {"processes": state.world.size}
    for name, value in found.items():
        if content[name] != value:
            raise ValueError(f"resume: {path} was trained with {name} {content[name]}, not {value}")
    if content["epoch"] >= config.epochs:
        raise ValueError(f"resume: {path} has all of its {config.epochs} epochs behind it")
    # How the optimiser runs is this device's choice.
    for saved, own in zip(
        content["optimizer"]["param_groups"], state.optimizer.param_groups, strict=True
    ):
        saved.update({name: own[name] for name in ("foreach", "fused") if name in own})
    for name in STATEFUL:
        getattr(state, name).load_state_dict(content[name])
    if state.average is not None:
        state.average.load_state_dict(content["average"])
    torch.set_rng_state(content["torch_rng"])
    device = torch.device(config.device)
    if content["cuda_rng"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(content["cuda_rng"], device)
    state.epoch, state.batch = content["epoch"], content["batch"]
    for name in ("losses", "correct"):
        # They are sums over the processes, which will be summed again.
        values = content[name] if state.world.is_first else torch.zeros_like(content[name])
        setattr(state, name, list(values.to(device).unbind()))
    state.best, state.history = content["best"], content["history"]


def check_same_run(path: Path, saved: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raises ValueError if ``asked`` has another value for what a run keeps to its end."""
    for name, value in asked.items():
        if name not in FREE and saved.get(name) != value:
            raise ValueError(
                f"resume: {path} was trained with {name}={saved.get(name)!r}, which a run keeps to "
                f"its end, but {name} is {value!r}"
            )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Raises:
        ValueError: if the file is not a checkpoint that this version can read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a checkpoint: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of bnres (format {FORMAT})")
    missing = [key for key in KEYS if key not in content]
    if missing or not isinstance(content["config"], dict):
        raise ValueError(f"{path} is not a checkpoint of bnres: it has no {', '.join(missing)}")
    return content
