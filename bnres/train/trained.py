"""Loads models from checkpoints and evaluates them."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from bnres.data import load_dataset
from bnres.train.checkpoint import read_checkpoint
from bnres.train.config import TrainConfig, field_type
from bnres.train.loop import evaluate
from bnres.train.state import build_model, make_batches
from bnres.train.weights import set_weights


def config_of(content: dict[str, Any], **changes: Any) -> TrainConfig:
    """Returns the options of a checkpoint's run, except for those that ``changes`` replaces.

    Raises:
        ValueError: if the checkpoint has an option that this version does not have, or if a value
            is not allowed.
    """
    saved = content["config"]
    known = {f.name for f in fields(TrainConfig)}
    if not known.issuperset(saved):
        raise ValueError(f"the checkpoint has unknown options: {', '.join(saved.keys() - known)}")
    kept = {k: Path(v) if v and field_type(k) is Path else v for k, v in saved.items()}
    return TrainConfig(**{**kept, "resume": None, **changes})


def load_trained(path: Path, content: dict[str, Any], config: TrainConfig) -> nn.Module:
    """Returns the model of a checkpoint in eval mode.

    If the run averaged its weights, the model has the averages. ``path`` is only named in errors.

    Raises:
        ValueError: if the weights do not fit the model that ``config`` names.
    """
    classes, channels = content["classes"], content["channels"]
    model = build_model(config, classes, channels, tuple(content["size"]))
    weights = content["model"]
    if content["average"] is not None:
        weights = dict(content["average"])
        del weights["n_averaged"]
        consume_prefix_in_state_dict_if_present(weights, "module.")
    set_weights(model, weights, str(path), config.model)
    return model.eval()


def evaluate_checkpoint(path: Path, **changes: Any) -> tuple[TrainConfig, float, float]:
    """Returns a checkpoint's options, and its model's mean loss and accuracy on held-out images.

    Args:
        path: a checkpoint of ``bnres train``.
        changes: options that replace those of the run, such as ``data``.

    Raises:
        ValueError: if ``path`` is not a checkpoint, or if the checkpoint does not fit the data or
            the model.
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
