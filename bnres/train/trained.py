"""Nets out of checkpoints, and their accuracy."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnres.data import load_dataset
from bnres.train.checkpoint import read_checkpoint
from bnres.train.config import TrainConfig, field_type
from bnres.train.loop import evaluate
from bnres.train.state import build_model, make_batches
from bnres.train.weights import check_weights

AVERAGED = "module."


def config_of(content: dict[str, Any], **changes: Any) -> TrainConfig:
    """The options that a checkpoint's run had, some of them changed.

    Raises:
        ValueError: for an option that this version does not have, or as `TrainConfig`.
    """
    saved = content["config"]
    known = {f.name for f in fields(TrainConfig)}
    if not known.issuperset(saved):
        raise ValueError(f"the checkpoint has unknown options: {', '.join(saved.keys() - known)}")
    kept = {k: Path(v) if v and field_type(k) is Path else v for k, v in saved.items()}
    return TrainConfig(**{**kept, "resume": None, **changes})


def load_trained(path: Path, content: dict[str, Any], config: TrainConfig) -> nn.Module:
    """The net of a checkpoint in eval mode, on ``config.device``, with averaged weights if it has any.

    Raises:
        ValueError: if the model that ``config`` names has other weights.
    """
    weights: dict[str, Tensor] = content["model"]
    average = content["average"]
    if average is not None:
        weights = {
            name.removeprefix(AVERAGED): value
            for name, value in average.items()
            if name.startswith(AVERAGED)
        }
    classes, channels = content["classes"], content["channels"]
    model = build_model(config, classes, channels, tuple(content["size"]))
    check_weights(weights, model, str(path), config.model)
    model.load_state_dict(weights)
    return model.eval()


def evaluate_checkpoint(path: Path, **changes: Any) -> tuple[TrainConfig, float, float]:
    """Options, mean loss and accuracy of a checkpoint on held-out images.

    Args:
        path: a checkpoint of ``bnres train``.
        changes: options to evaluate with in place of its run's, such as ``data``.

    Raises:
        ValueError: if it is not a checkpoint, or the data or the model does not fit.
    """
    content = read_checkpoint(path)
    config = config_of(content, sync_bn=False, cuda_graphs=False, **changes)
    dataset = load_dataset(config.dataset, config.data, checksum=config.checksum)
    if dataset.classes != content["classes"]:
        raise ValueError(
            f"data: {dataset.name} has {dataset.classes} classes, but {path} was trained on "
            f"{content['classes']}"
        )
    batches = make_batches(config, dataset, torch.device(config.device))
    return config, *evaluate(load_trained(path, content, config), batches, config)
