"""Everything a training run changes as it goes: what a checkpoint has to hold."""

from dataclasses import dataclass, field

import torch
from torch import nn

from bnres.augment import Compose, Normalize, RandomCrop
from bnres.data import Batches, FolderDataset, ImageDataset, StreamedBatches
from bnres.models import create_model
from bnres.train.config import DTYPES, TrainConfig

# The momentum falls while the learning rate rises, and the other way round.
MOMENTUM = (0.85, 0.95)


@dataclass
class TrainState:
    """The state of a run; order and augmentation hang on its seed, epoch and step alone."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


AnyBatches = Batches | StreamedBatches


def make_batches(
    config: TrainConfig, dataset: ImageDataset | FolderDataset, device: torch.device
) -> AnyBatches:
    """Batches of a data set, shifted at random and normalised by its own statistics."""
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    normalize = Normalize(dataset.mean, dataset.std)
    shift = [RandomCrop(dataset.size, padding=config.shift)] if config.shift else []
    train_augment = Compose([*shift, normalize], memory_format=memory_format)
    test_augment = Compose([normalize], memory_format=memory_format)
    place = (device, config.batch_size, train_augment, test_augment, config.seed)
    if isinstance(dataset, FolderDataset):
        return StreamedBatches(dataset, *place, config.workers)
    return Batches(dataset, *place)


def build_state(
    config: TrainConfig, dataset: ImageDataset | FolderDataset
) -> tuple[TrainState, AnyBatches]:
    """A run at its start: the same weights, order and shifts for the same ``config.seed``."""
    torch.manual_seed(config.seed)
    device = torch.device(config.device)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    batches = make_batches(config, dataset, device)
    options = {} if config.act is None else {"act": config.act}
    model = create_model(
        config.model,
        num_classes=dataset.classes,
        in_channels=dataset.channels,
        fused=config.fused,
        **options,
    )
    model = model.to(device)
    model = model.to(memory_format=memory_format)  # type: ignore[call-overload]  # a gap in stubs
    optimizer = torch.optim.SGD(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        momentum=MOMENTUM[1],
        nesterov=True,
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=config.lr,
        total_steps=config.epochs * len(batches),
        base_momentum=MOMENTUM[0],
        max_momentum=MOMENTUM[1],
    )
    scaler = torch.amp.GradScaler(device.type, enabled=DTYPES[config.dtype] == torch.float16)
    return TrainState(model, optimizer, scheduler, scaler), batches


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weights with decay; biases and norms, which have one dimension, without."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
