"""Processes that form a gloo group and run functions for tests."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 60  # a rank waits for another rank at most this long


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _serve(rank: int, size: int, port: int, pipe: Any) -> None:
    from bnres.kernels.interpreter import is_interpreting

    torch.set_num_threads(1)
    if is_interpreting():
        from tests import fast_interpreter

        fast_interpreter.patch_once()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS))
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            pipe.send((True, function(*args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """``size`` processes that form torch.distributed's default group.

    They start quickly, because they are forked from a process that has imported torch and bnres.
    """

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.ranks", "bnres", "bnres.kernels.bn_backward"])
        port, self.pipes, self.processes = free_port(), [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Returns the results of ``function(*args)`` on each rank.

        Raises:
            AssertionError: if a rank hangs, or if ``function`` raises on a rank. The message has
                the traceback of ``function``.
        """
        for pipe in self.pipes:
            pipe.send((function, args))
        found = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(2 * SECONDS), f"rank {rank} hangs"
            found.append(pipe.recv())
        errors = [f"rank {r}: {text}" for r, (done, text) in enumerate(found) if not done]
        assert not errors, "\n".join(errors)
        return [result for _, result in found]

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
            process.join(10)
            process.kill()
