"""The processes that ``torchrun`` starts for a run, and their collective operations."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that train together, by default only this process.

    Attributes:
        rank: the number of this process, from 0 to ``size`` - 1.
        size: the number of processes.
        flags: a CPU process group for small messages, such as a request to stop. These messages do
            not wait for the GPUs. It is None if there is only one process.
    """

    rank: int = 0
    size: int = 1
    flags: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sums a tensor over the processes, in place, and returns it."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true in at least one process."""
        if self.size == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.flags)
        return bool(value)

    def from_first(self, make: Callable[[], T]) -> T:
        """Calls ``make`` in the first process only, and returns the result in every process."""
        made = [make() if self.is_first else None]
        if self.size > 1:
            dist.broadcast_object_list(made, 0, group=self.flags)
        return made[0]  # type: ignore[return-value]

    def share_buffers(self, *models: nn.Module | None) -> None:
        """Copies the first process's buffers, such as running statistics, to the other processes.

        The buffers differ, because each process updates them from its own part of each batch.
        """
        if self.size > 1:
            for model in models:
                for buffer in () if model is None else model.buffers():
                    dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Waits until all processes have called this method."""
        if self.size > 1:
            dist.barrier(group=self.flags)


def choose_gpu() -> None:
    """Selects this process's GPU as torch's current device.

    It must be called before a tensor is put on a GPU. If this process has no GPU, it does nothing.
    """
    rank = int(os.environ.get("LOCAL_RANK", "-1"))
    if 0 <= rank < torch.cuda.device_count():
        torch.cuda.set_device(rank)


def may_be_restarted() -> bool:
    """Whether torchrun starts the processes again if one of them dies (``--max-restarts``).

    torchrun's count of restarts can't tell whether this process was restarted: each machine counts
    only the restarts that its own processes caused.
    """
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def join(device: str) -> tuple[World, str]:
    """Connects the processes that ``torchrun`` started, and returns them and this process's device.

    If there are several processes and ``device`` is a GPU, this process's own GPU replaces it.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(), device
    if torch.device(device).type == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    flags = dist.new_group(backend="gloo")
    assert isinstance(flags, dist.ProcessGroup)
    return World(dist.get_rank(), size, flags), device


def leave() -> None:
    """Disconnects this process from the others."""
    if dist.is_initialized():
        dist.destroy_process_group()
