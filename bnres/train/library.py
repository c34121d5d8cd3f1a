"""Trains a module that a program has made."""

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
    """The metrics of each epoch, as in metrics.jsonl; ``model`` is trained and in eval mode then.

    While it is trained `bnres.fuse` fuses it, unless ``config.fused`` is False. No files are written.

    Args:
        model: takes images (N, channels, height, width) and returns (N, classes). It is moved to
            ``config.device``, and has the averaged weights if the run averages them.
        dataset: such as `bnres.data.make_dataset` makes of tensors.
        config: the options; those of the data set and the model are not read.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if the model does not fit the data, or for an option that does not go with it.
        NonFiniteLoss: if a loss is infinite or NaN.
    """
    for option in ("resume", "sync_bn"):
        if getattr(config, option):
            raise ValueError(f"{option}: only bnres train has it, not train_model")
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
