"""Builds the state of a training run, which a checkpoint stores."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bnres.data import Batches, EpochBatches, FolderDataset, ImageDataset, StreamedBatches
from bnres.fusion.backend import backend, fuse
from bnres.models import create_model, is_factory
from bnres.nn.sync import convert_sync_batchnorm
from bnres.train.augmentation import chains
from bnres.train.config import DTYPES, TrainConfig
from bnres.train.distributed import World
from bnres.train.optimization import make_optimizer, make_schedule, xavier_uniform
from bnres.train.passes import GraphedPasses, Passes
from bnres.train.shapes import check_shapes, initialize_lazy_modules
from bnres.train.weights import is_weights, load_weights


@dataclass
class TrainState:
    """The state of a training run.

    It contains no random generators, because the order and the augmentation of the images depend
    only on the seed, the epoch and the number of the batch.

    Attributes:
        model: the model.
        passes: runs forward and backward of a batch.
        optimizer: torch's optimiser.
        scheduler: the learning-rate schedule.
        scaler: the gradient scaler. It has an effect only in fp16.
        average: a copy of the model with averaged weights, or None if weights are not averaged.
        epoch: number of completed epochs.
        batch: number of completed batches in the current epoch.
        losses, correct: for each completed batch of the current epoch, the loss and the number of
            correctly classified images, as tensors on the device.
        best: greatest test accuracy so far.
        history: one row of metrics for each completed epoch.
        classes, channels: the number of classes, and the number of channels of the images.
        size: height and width of the model's input.
        train_count: number of training images.
        mean, std: the data set's mean and standard deviation of each channel.
        world: the processes that train together.
    """

    model: nn.Module
    passes: Passes
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    average: AveragedModel | None
    epoch: int = 0
    batch: int = 0
    losses: list[Tensor] = field(default_factory=list)
    correct: list[Tensor] = field(default_factory=list)
    best: float = -1.0
    history: list[dict[str, float]] = field(default_factory=list)
    classes: int = 0
    channels: int = 0
    size: tuple[int, int] = (0, 0)
    train_count: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    world: World = field(default_factory=World)

    @property
    def forward(self) -> Any:
        """The model that training calls. It may be compiled, or wrapped for several processes."""
        return self.passes.forward

    @property
    def evaluated(self) -> Any:
        """The model to evaluate: the average if there is one.

        This model is never wrapped in DistributedDataParallel, which would exchange buffers at
        each call.
        """
        if self.average is not None:
            return self.average
        return self.forward if self.world.size == 1 else self.model


def make_batches(
    config: TrainConfig,
    dataset: ImageDataset | FolderDataset,
    device: torch.device,
    world: World | None = None,
) -> EpochBatches:
    """Returns this process's part of each batch of a data set, augmented as ``config`` says."""
    train_augment, test_augment = chains(config, dataset)
    shard = (0, 1) if world is None else (world.rank, world.size)
    place = (device, config.batch_size, train_augment, test_augment, config.seed, config.drop_last)
    if isinstance(dataset, FolderDataset):
        return StreamedBatches(dataset, *place, shard, workers=config.workers)
    return Batches(dataset, *place, shard)


def build_model(
    config: TrainConfig,
    classes: int,
    channels: int,
    size: tuple[int, int],
    given: nn.Module | None = None,
) -> nn.Module:
    """Builds a model on ``config.device``, with random weights that depend on ``config.seed``.

    If ``given`` is a model, this model is used instead of ``config.model``, and is changed in
    place. ``size`` is the height and width of the images.
    """
    torch.manual_seed(config.seed)
    if given is None:
        options: dict[str, Any] = {
            name: getattr(config, name)
            for name in ("act", "stem")
            if getattr(config, name) is not None
        }
        model = create_model(
            config.model, num_classes=classes, in_channels=channels, fused=config.fused, **options
        )
    else:
        model = fuse(given, inplace=True) if config.fused else given
    initialize_lazy_modules(model, name_of(config, given), (channels, *size))
    if config.init == "xavier":
        xavier_uniform(model)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    return model.to(config.device).to(memory_format=memory_format)  # type: ignore[call-overload]


def name_of(config: TrainConfig, given: nn.Module | None) -> str:
    """Returns the model's name for error messages."""
    return config.model if given is None else type(given).__name__


def make_deterministic() -> None:
    """Restricts torch to deterministic algorithms in this process."""
    # Without this setting cuBLAS is not deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def build_state(
    config: TrainConfig,
    dataset: ImageDataset | FolderDataset,
    world: World | None = None,
    *,
    model: nn.Module | None = None,
) -> tuple[TrainState, EpochBatches]:
    """Returns the state of a new run, and its batches.

    Args:
        config: the options of the run.
        dataset: the data.
        world: the processes that train together. By default there is only this one.
        model: a model to train instead of the one that ``config.model`` names. It is changed in
            place.

    Raises:
        ValueError: if the model does not fit the data or the file of initial weights, if the images
            are too small for the crop, if the batch size does not fit the number of images or of
            processes, or if ``config.cuda_graphs`` is set with several processes.
    """
    world = world or World()
    if config.cuda_graphs and world.size > 1:
        raise ValueError(f"cuda_graphs works only with one process, got {world.size}")
    if config.deterministic:
        make_deterministic()
    device = torch.device(config.device)
    batches = make_batches(config, dataset, device, world)
    size = dataset.size if config.crop_size is None else (config.crop_size, config.crop_size)
    name = name_of(config, model)
    # Models of bnres are not fused by bnres.fuse, because they are built with fused layers.
    fuses = config.fused and (model is not None or is_factory(config.model))
    model = build_model(config, dataset.classes, dataset.channels, size, model)
    if is_weights(config.init) and config.resume is None:
        load_weights(Path(config.init), model, name)
    check_shapes(config, model, name, (dataset.channels, *size), dataset.classes)
    if config.sync_bn:
        convert = nn.SyncBatchNorm.convert_sync_batchnorm
        model = convert_sync_batchnorm(model) if config.fused else convert(model)
    parallel: nn.Module = model
    if world.size > 1:
        devices = [device] if device.type == "cuda" else None
        # DDP exchanges gradients in buckets. Gradients that are views of them need no copy.
        parallel = DistributedDataParallel(model, devices, gradient_as_bucket_view=True)
    optimizer = make_optimizer(config, model)
    steps_per_epoch = -(-len(batches) // config.accumulate)
    average = None
    if config.ema is not None:
        average = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True
        )
        # The host reads n_averaged at each step, and would have to wait for a GPU.
        average.n_averaged = average.n_averaged.cpu()
        if fuses:  # AveragedModel copies the model, and a copy of a fused model is not fused
            fuse(average.module, inplace=True)
    forward: Any = parallel
    if config.compile:
        # torch.compile ignores what bnres.fuse did, so bnres's backend fuses the model again.
        through: dict[str, Any] = {"backend": backend, "options": {"inner": "inductor"}}
        forward = torch.compile(parallel, **(through if fuses else {}))
    scaler = torch.amp.GradScaler(device.type, enabled=DTYPES[config.dtype] == torch.float16)
    if config.cuda_graphs:
        passes: Passes = GraphedPasses(model, forward, scaler, config)
    else:
        passes = Passes(forward, scaler, config)
    state = TrainState(
        model=model,
        passes=passes,
        optimizer=optimizer,
        scheduler=make_schedule(config, optimizer, steps_per_epoch),
        scaler=scaler,
        average=average,
        classes=dataset.classes,
        channels=dataset.channels,
        size=size,
        train_count=batches.train_count,
        mean=dataset.mean,
        std=dataset.std,
        world=world,
    )
    return state, batches
