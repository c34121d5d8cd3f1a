"""Counts the bytes that kernels touch in triton's interpreter, in units of S.

S is the size of one activation tensor in bytes. Two numbers are counted:

- *Sectors* are the bytes of the distinct 32-byte sectors that a launch reads, plus those that it
  writes. A GPU that moves each sector once moves this many bytes.
- *Lanes* are the bytes of all elements that a launch reads or writes. An element that is read twice
  counts twice.

``python -m benchmarks audit`` runs this module in a separate process with TRITON_INTERPRET=1.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from benchmarks.audit.operations import OPERATIONS, steps
from benchmarks.audit.step import Build, aten_counts, held_bytes, inference_bytes, launches
from benchmarks.byte_model import PASSES, passes
from benchmarks.operations import LAYOUTS
from bnres import models

# Shapes of activations, small because the interpreter is slow. They fill whole tiles.
SHAPE, POOLED_SHAPE = (16, 64, 7, 7), (2, 64, 16, 16)
NET_INPUT = (256, 3, 224, 224)
NETS: dict[str, Build] = {"stock": partial(models.resnet18, fused=False), "fused": models.resnet18}
SECTOR_BYTES = 32
ACTIVATIONS = (
    "x_ptr", "y_ptr", "dy_ptr", "dy_skip_ptr", "dx_ptr", "dz_ptr", "dresidual_ptr", "residual_ptr",
    "mask_ptr", "argmax_ptr", "x_max_ptr",
)  # fmt: skip


@dataclass
class Traffic:
    """The bytes of activations that launches touch, counted as lanes and as sectors."""

    lanes: int = 0
    sectors: int = 0


@dataclass
class _Range:
    """The addresses of a tensor, and which of its sectors a launch has read and written."""

    start: int
    stop: int
    read: list[np.ndarray] = field(default_factory=list)
    written: list[np.ndarray] = field(default_factory=list)


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Inside the context, counts the bytes of activations that interpreted launches touch."""
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
    """Counts the bytes that an operation touches in each direction.

    The keys are ``eval``, ``forward`` (in training) and ``backward``.
    """

    def random() -> Tensor:
        return torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)

    counts = {}
    for name, step in steps(operation, random).items():
        with count_traffic() as traffic:
            step()
        counts[name] = traffic
    return counts


@dataclass(frozen=True)
class Row:
    """The bytes that an operation touches, divided by the bytes of one activation tensor.

    ``step`` is ``eval``, ``forward`` (in training) or ``backward``. ``floor`` is the least that a
    fused operation can touch, as `benchmarks.byte_model` explains.
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


def main() -> None:
    """Prints the counts as JSON. Training steps and inference are those of ResNet-18."""
    rows = audit()
    sectors = {(r.operation, r.step): r.sectors for r in rows if r.layout == "channels_last"}
    # ATen's operations are counted in fp32, because in bf16 conversions of the parameters would be
    # counted too.
    found = {
        "memory": [asdict(row) for row in rows],
        "traffic": {
            name: aten_counts(build, NET_INPUT, sectors).moved for name, build in NETS.items()
        }
        | {
            f"{name} inference": inference_bytes(build, NET_INPUT, sectors)
            for name, build in NETS.items()
        },
        "held": {name: held_bytes(build, NET_INPUT) for name, build in NETS.items()}
        | {"recompute": held_bytes(models.resnet18, NET_INPUT, recomputes=True)},
        "launches": {
            f"{name}, ATen": aten_counts(build, NET_INPUT, sectors, torch.float32).operations
            for name, build in NETS.items()
        }
        | {"fused, Triton": launches(models.resnet18, NET_INPUT)},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
