"""Counts the memory that interpreted kernels touch. The unit S is the bytes of one activation.

Two numbers are counted. *Lanes* are the bytes that unmasked lanes access. *Sectors* are the bytes
of the distinct 32-byte sectors of a tensor that a launch touches. Both numbers are needed. Memory
is moved in whole sectors, of which lanes may use only a part, but the number of sectors does not
include repeated accesses. TRITON_INTERPRET=1 has to be set. ``python -m benchmarks audit`` runs
this module in a separate process.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from benchmarks.audit.launches import step_launches
from benchmarks.audit.operations import OPERATIONS, steps
from benchmarks.audit.saved import saved_bytes
from benchmarks.audit.traffic import step_bytes
from benchmarks.byte_model import PASSES, passes
from benchmarks.operations import LAYOUTS
from benchmarks.sites import Site
from bnres import models
from bnres.kernels.config import launch_config, tile_for
from bnres.kernels.layout import ChannelView

# These are the shapes of activations. They are small, because the interpreter is slow, but large
# enough for whole tiles.
SHAPE, POOLED_SHAPE = (16, 64, 7, 7), (2, 64, 16, 16)
NET_INPUT = (256, 3, 224, 224)
SECTOR_BYTES = 32
ACTIVATIONS = (
    "x_ptr", "y_ptr", "dy_ptr", "dy_skip_ptr", "dx_ptr", "dz_ptr", "dresidual_ptr", "residual_ptr",
    "mask_ptr", "argmax_ptr", "x_max_ptr",
)  # fmt: skip


@dataclass
class Traffic:
    """Bytes of activation tensors that launches touch.

    Attributes:
        lanes: number of bytes that unmasked lanes access.
        sectors: number of bytes in the distinct sectors.
    """

    lanes: int = 0
    sectors: int = 0


@dataclass
class _Range:
    """The address range of a tensor, and the sectors that a launch has read and written."""

    start: int
    stop: int
    read: list[np.ndarray] = field(default_factory=list)
    written: list[np.ndarray] = field(default_factory=list)


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Inside the context, counts all accesses of interpreted launches to activation tensors."""
    total = Traffic()
    ranges: list[_Range] = []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    execute = GridExecutor.__call__

    def note(pointers: Any, mask: Any, written: bool) -> None:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        if not addresses.size:
            return
        for each in ranges:
            if each.start <= addresses[0] < each.stop:
                size = pointers.get_element_ty().primitive_bitwidth // 8
                total.lanes += addresses.size * size
                touched = np.unique(addresses // SECTOR_BYTES)
                (each.written if written else each.read).append(touched)

    def counted_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        note(ptrs, mask, written=False)
        return load(self, ptrs, mask, *rest)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(ptrs, mask, written=True)
        return store(self, ptrs, value, mask, *rest)

    def counted_launch(self: Any, *arguments: Any, **named: Any) -> None:
        tensors = [named[name] for name in ACTIVATIONS if named.get(name) is not None]
        starts = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
        ranges[:] = [_Range(start, start + size) for start, size in starts.items()]
        execute(self, *arguments, **named)
        for each in ranges:
            for touched in (each.read, each.written):
                if touched:
                    total.sectors += np.unique(np.concatenate(touched)).size * SECTOR_BYTES
        ranges.clear()

    InterpreterBuilder.create_masked_load = counted_load
    InterpreterBuilder.create_masked_store = counted_store
    GridExecutor.__call__ = counted_launch
    try:
        yield total
    finally:
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store
        GridExecutor.__call__ = execute


def operation_traffic(
    operation: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> dict[str, Traffic]:
    """Counts the bytes of an operation in ``eval``, ``forward`` (in training) and ``backward``."""

    def random() -> Tensor:
        return torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)

    counts = {}
    for name, step in steps(operation, random).items():
        with count_traffic() as traffic:
            step()
        counts[name] = traffic
    return counts


def channel_buffer_share(
    site: Site, batch: int, channels_last: bool, itemsize: int, sm_count: int
) -> dict[str, float]:
    """Returns the bytes of per-channel buffers divided by the bytes of activations, by direction.

    The bytes of the per-channel buffers are computed from the launch grids. Every program reads the
    parameters of its channels. Partial sums are written once and read once.
    """
    n, channels, height, width = site.shape(batch)
    inner = height * width
    view = ChannelView(n * inner, channels, 1) if channels_last else ChannelView(n, channels, inner)
    tile = tile_for(view, itemsize)
    has_residual = site.operation == "bn_add_relu"

    def parameters(kernel: str, buffers: int) -> int:
        config = launch_config(kernel, view, tile, sm_count)
        return config.col_blocks * config.splits * tile.block_channels * buffers * 4

    def partials(kernel: str) -> int:
        config = launch_config(kernel, view, tile, sm_count)
        return 2 * 2 * config.splits * channels * 4

    apply = "apply_residual" if has_residual else "apply"
    tensor = view.numel * itemsize
    return {
        "forward": (partials("stats") + parameters(apply, 4))
        / (tensor * (4 if has_residual else 3)),
        "backward": (partials("reduce") + parameters("reduce", 4) + parameters("dx", 6))
        / (tensor * (6 if has_residual else 5)),
    }


@dataclass(frozen=True)
class Row:
    """The memory that an operation touches in one direction, in units of S.

    ``step`` is the direction. ``floor`` is the least memory that any implementation could touch.
    """

    operation: str
    step: str
    layout: str
    lanes: float
    sectors: float
    floor: float


def audit() -> list[Row]:
    """Returns a row for each operation, direction and layout, in bf16."""
    rows = []
    for operation in OPERATIONS:
        shape = POOLED_SHAPE if "pool" in operation else SHAPE
        size = torch.Size(shape).numel() * torch.bfloat16.itemsize
        for layout, memory_format in LAYOUTS.items():
            counts = operation_traffic(operation, shape, torch.bfloat16, memory_format)
            rows += [
                Row(
                    operation, step, layout, traffic.lanes / size, traffic.sectors / size,
                    passes(operation, step, torch.bfloat16.itemsize),
                )
                for step, traffic in counts.items()
                if (operation, step) in PASSES
            ]  # fmt: skip
    return rows


def held() -> dict[str, int]:
    """Counts the bytes that ResNet-18's forward holds for backward, in bf16 and channels_last."""
    return {
        "stock": saved_bytes(lambda: models.resnet18(fused=False), NET_INPUT),
        "fused": saved_bytes(models.resnet18, NET_INPUT),
        "recompute": saved_bytes(models.resnet18, NET_INPUT, recomputes=True),
    }


def traffic(rows: Sequence[Row]) -> dict[str, int]:
    """Counts the bytes that a training step of ResNet-18 moves, without its convolutions.

    The step is in bf16 and channels_last.

    Args:
        rows: rows of `audit`, which count the bytes of the fused operations.
    """
    counts = {(r.operation, r.step): r.sectors for r in rows if r.layout == "channels_last"}
    return {
        "stock": step_bytes(lambda: models.resnet18(fused=False), NET_INPUT, counts),
        "fused": step_bytes(models.resnet18, NET_INPUT, counts),
    }


def launches() -> dict[str, int]:
    """Counts Triton's launches and ATen's operations in a training step of ResNet-18.

    An operation of ATen makes one or more launches.
    """
    _, stock = step_launches(lambda: models.resnet18(fused=False), NET_INPUT)
    triton, aten = step_launches(models.resnet18, NET_INPUT)
    return {"stock, ATen": stock, "fused, ATen": aten, "fused, Triton": triton}


if __name__ == "__main__":
    rows = audit()
    found = {"traffic": traffic(rows), "held": held(), "launches": launches()}
    print(json.dumps({"rows": [asdict(row) for row in rows], **found}))
