"""Writes checkpoints completely or not at all, and reads them without running code from them."""

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from bnres.errors import is_out_of_memory
from bnres.files import write_bytes
from bnres.train.config import TrainConfig
from bnres.train.state import TrainState
from bnres.train.weights import set_weights

FORMAT = 4
# Options that may be changed when a run is resumed.
FREE = (
    "fused", "device", "data", "checksum", "workers", "compile", "cuda_graphs", "deterministic",
    "eval_flip", "checkpoint_steps", "tensorboard", "resume",
)  # fmt: skip
# Attributes of TrainState that are saved and restored through their state_dict.
STATEFUL = ("optimizer", "scheduler", "scaler")
# Attributes of TrainState that describe the data. They must be the same when a run is resumed.
OF_DATA = ("classes", "channels", "train_count", "mean", "std")


def save_checkpoint(path: Path, state: TrainState, config: TrainConfig) -> None:
    """Writes a checkpoint. If the process is killed while writing, the file keeps its old content.

    Only the first process of a run writes. Every process must call this function, because the
    losses are summed over the processes.
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
        **{name: getattr(state, name) for name in OF_DATA},
        "history": state.history,
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "model": state.model.state_dict(),
        "average": None if state.average is None else state.average.state_dict(),
        **{name: getattr(state, name).state_dict() for name in STATEFUL},
    }
    # torch.save writes to memory, because it would abort the process if a disk were full.
    written = io.BytesIO()
    torch.save(content, written)
    write_bytes(path, written.getbuffer())


def checkpoint_bytes(state: TrainState) -> int:
    """Returns the approximate size of a checkpoint in bytes, including the optimiser's moments."""
    weights, buffers = (
        sum(t.nbytes for t in tensors)
        for tensors in (state.model.parameters(), state.model.buffers())
    )
    averaged = state.average is not None
    # AdamW is a subclass of Adam.
    moments = 2 if isinstance(state.optimizer, torch.optim.Adam) else 1
    return (1 + moments + averaged) * weights + (1 + averaged) * buffers


def load_checkpoint(path: Path, state: TrainState, config: TrainConfig) -> None:
    """Sets the ``state`` of a resumed run to the state that the checkpoint stores.

    Raises:
        ValueError: if the file is not a checkpoint of bnres, if the checkpoint's run is complete,
            if the data or the model differs from the checkpoint's, or if an option that is not in
            ``FREE`` differs from the checkpoint's.
    """
    content = read_checkpoint(path)
    check_same_run(path, content["config"], config.as_dict())
    for name in OF_DATA:
        if content[name] != (value := getattr(state, name)):
            raise ValueError(
                f"resume: {path} was trained with {name}={content[name]}, but now {name} is {value}"
            )
    if content["epoch"] >= config.epochs:
        raise ValueError(
            f"resume: {path} is already complete ({config.epochs} of {config.epochs} epochs)"
        )
    set_weights(state.model, content["model"], f"resume: {path}", config.model)
    # The optimiser keeps its own options fused and foreach, because they depend on the device.
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
        # The saved values are sums over all processes. train_epoch sums over the processes again,
        # so only the first process gets the saved values.
        values = content[name] if state.world.is_first else torch.zeros_like(content[name])
        setattr(state, name, list(values.to(device).unbind()))
    state.best, state.history = content["best"], content["history"]


def check_same_run(path: Path, saved: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raises a ValueError if an option in ``asked`` differs from ``saved`` and is not in ``FREE``.

    ``saved`` holds the options of the checkpoint ``path``, and ``asked`` those of the resumed run.
    """
    for name, value in asked.items():
        if name not in FREE and saved.get(name) != value:
            raise ValueError(
                f"resume: {path} was trained with {name}={saved.get(name)!r}, which can't change "
                f"when a run is resumed, but got {name}={value!r}"
            )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Returns the content of a checkpoint, with its tensors on the CPU.

    Raises:
        ValueError: if there is no such file, or this version of bnres can't read it.
    """
    if path.is_dir():
        raise ValueError(
            f"{str(path)!r} is a folder; give a file, such as {str(path / 'best.pt')!r}"
        )
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    data = io.BytesIO(path.read_bytes())
    content: Any = None
    # torch's error is not shown, because it advises the user to set weights_only=False. With that
    # setting, torch runs code from the file.
    try:
        with zipfile.ZipFile(data) as archive:
            if archive.testzip() is None:  # torch.load does not verify the archive's checksums
                data.seek(0)
                content = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # reading a damaged file may raise any error
        if is_out_of_memory(error):
            raise
    if not isinstance(content, dict) or not {"format", "config", "model"} <= set(content):
        raise ValueError(f"{path} is damaged, or not a checkpoint of bnres")
    if content["format"] != FORMAT:
        raise ValueError(f"{path} has format {content['format']!r}; this version reads {FORMAT}")
    return content
