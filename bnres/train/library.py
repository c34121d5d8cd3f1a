"""Trains a model that the caller passes, instead of one that a command-line option names."""

from rich.console import Console
from torch import nn

from bnres.data import FolderDataset, ImageDataset
from bnres.fusion import unfuse
from bnres.train.config import TrainConfig
from bnres.train.run import Run, progress_bar, run_epoch
from bnres.train.state import build_state


def train_model(
    model: nn.Module, dataset: ImageDataset | FolderDataset, config: TrainConfig
) -> list[dict[str, float]]:
    """Trains ``model`` in place, and returns each epoch's metrics.

    The metrics are those that ``bnres train`` writes to metrics.jsonl. During training the model is
    fused by `bnres.fuse`, unless ``config.fused`` is False. Afterwards the model is unfused and in
    eval mode. No files are written.

    Args:
        model: maps images (N, channels, height, width) to logits (N, classes). It is moved to
            ``config.device``. If ``config.ema`` is set, it has the averaged weights at the end.
        dataset: the data, for example from `bnres.data.make_dataset`.
        config: the options. ``config.dataset`` and ``config.model`` are ignored.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if the model does not fit the data, or if ``config`` sets ``resume`` or
            ``sync_bn``, which only ``bnres train`` supports.
        NonFiniteLoss: if a loss is infinite or NaN.
    """
    for option in ("resume", "sync_bn"):
        if getattr(config, option):
            raise ValueError(f"{option} works only with bnres train, not with train_model")
    unfuse(model, inplace=True)
    try:
        state, batches = build_state(config, dataset, model=model)
        run = Run(config, state, batches)
        with progress_bar(Console()) as progress:
            for _ in range(config.epochs):
                run_epoch(run, progress)
    finally:
        unfuse(model, inplace=True)
    if state.average is not None:
        model.load_state_dict(state.average.module.state_dict())
    model.eval()
    return state.history
