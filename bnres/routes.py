"""Chooses how to compute a convolution followed by batch norm. Each way is called a route.

With the route "kernel", one of our kernels computes both. With the route "torch", torch's
convolution runs, followed by our batch norm. ``bnres tune`` measures both routes on a GPU, and
saves the times and our kernel's fastest configuration in a table. Each model of GPU has its own
table, a file in the user's cache folder. The environment variable ``BNRES_ROUTES`` can name another
file.

By default the faster route is chosen, except that the route is "torch":

- for shapes that were not measured,
- for fp32 if ``torch.backends.cudnn.allow_tf32`` is False, because our kernel rounds fp32 to TF32,
- in graphs that torch.compile captures, because a graph can't read the table's file.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bnres.files import write_text
from bnres.kernels.conv_config import ConvConfig, ConvShape

ROUTES = ("auto", "torch", "kernel")
_override = "auto"


@dataclass(frozen=True)
class ConvCall:
    """A convolution followed by a batch norm: the facts on which their time depends."""

    dtype: str
    batch: int
    channels: int
    height: int
    width: int
    out_channels: int
    shape: ConvShape
    has_residual: bool

    @property
    def key(self) -> str:
        """The name of the call in printed text."""
        s = self.shape
        return (
            f"{self.dtype} {self.batch}x{self.channels}x{self.height}x{self.width} -> "
            f"{self.out_channels} kernel {s.kernel_h}x{s.kernel_w} "
            f"stride {s.stride_h}x{s.stride_w} "
            f"padding {s.padding_h}x{s.padding_w} dilation {s.dilation_h}x{s.dilation_w}"
            f"{' residual' if self.has_residual else ''}"
        )


@dataclass(frozen=True)
class Measured:
    """A row of a table: the measurements of one call.

    Attributes:
        call: the call.
        config: the fastest configuration of our kernel, or None if none could be measured.
        kernel_ms: the time in milliseconds of our kernel with ``config``, or None without a config.
        torch_ms: the time in milliseconds of torch's convolution followed by our batch norm.
        failed: maps the name of each configuration that failed to the reason.
        left_out: names of the configurations that were not measured because the time limit of
            ``bnres tune`` had passed.
    """

    call: ConvCall
    config: ConvConfig | None
    kernel_ms: float | None
    torch_ms: float
    failed: dict[str, str]
    left_out: list[str]


@contextmanager
def use_conv_route(route: str) -> Iterator[None]:
    """Sets the route inside a ``with`` block, in all threads.

    Args:
        route: ``"torch"`` for torch's convolution, ``"kernel"`` for our kernel wherever it supports
            the input, or ``"auto"`` for the faster of the two. Outside of this context the route is
            ``"auto"``.

    Raises:
        ValueError: if ``route`` is none of these three names.
    """
    global _override
    if route not in ROUTES:
        raise ValueError(f"route must be one of {', '.join(ROUTES)}, got {route!r}")
    before, _override = _override, route
    try:
        yield
    finally:
        _override = before


def conv_route() -> str:
    """Returns the route that `use_conv_route` has set, by default ``"auto"``."""
    return _override


def kernel_may_run(device: torch.device) -> bool:
    """Whether our kernel may be chosen for at least one convolution on a device.

    This check is faster than making a `ConvCall` for `kernel_config`.
    """
    return bool(_measured_configs(device)) if _override == "auto" else _override == "kernel"


def kernel_config(call: ConvCall, device: torch.device) -> tuple[bool, ConvConfig | None]:
    """Returns whether our kernel must compute ``call``, and the kernel's fastest configuration.

    The configuration is None if our kernel must not compute ``call``. With the route ``"kernel"``
    it is also None, because then `conv_config` chooses the configuration.
    """
    if _override != "auto":
        return _override == "kernel", None
    config = _measured_configs(device).get(call)
    return config is not None, config


def _measured_configs(device: torch.device) -> dict[ConvCall, ConvConfig]:
    """Returns `load_table` of a GPU's table, or {} for a CPU and inside torch.compile."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return {}
    return load_table(table_path(gpu_name(device)))


@cache
def gpu_name(device: torch.device) -> str:
    """Returns the GPU's name as part of a file name: lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def table_path(gpu: str) -> Path:
    """Returns the path of the table of a GPU.

    If the environment variable ``BNRES_ROUTES`` is set, the path is its value.
    """
    return _table_path(gpu, os.environ.get("BNRES_ROUTES"), os.environ.get("XDG_CACHE_HOME"))


@cache  # making a Path takes longer than a call of batch norm
def _table_path(gpu: str, override: str | None, cache_home: str | None) -> Path:
    if override:
        return Path(override)
    return Path(cache_home or Path.home() / ".cache") / "bnres" / f"routes-{gpu}.json"


@cache
def load_table(path: Path) -> dict[ConvCall, ConvConfig]:
    """Maps each call for which our kernel is faster than torch to the kernel's configuration.

    The result is cached. The file is read again only after `save_table`.

    Raises:
        ValueError: if `read_table` raises it.
    """
    return {
        row.call: row.config
        for row in read_table(path)
        if row.config is not None and row.kernel_ms is not None and row.kernel_ms < row.torch_ms
    }


def read_table(path: Path) -> list[Measured]:
    """Returns the rows of a table, or an empty list if the file does not exist.

    Raises:
        ValueError: if the file is not a table in the format of this version of bnres.
    """
    try:
        return [_measured(row) for row in json.loads(path.read_text(encoding="utf-8"))["routes"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a table of routes of this version: {error!r}; delete it, then run "
            "bnres tune"
        ) from error


def _measured(row: dict[str, Any]) -> Measured:
    call = ConvCall(**{**row["call"], "shape": ConvShape(**row["call"]["shape"])})
    config = None if row["config"] is None else ConvConfig(**row["config"])
    return Measured(**{**row, "call": call, "config": config})


def save_table(path: Path, rows: list[Measured], about: dict[str, str]) -> None:
    """Adds rows to a table. A row replaces an earlier row of the same call.

    Args:
        path: the file of the table.
        rows: the rows to add.
        about: facts about the measurement, such as the GPU. They replace those in the table.

    Raises:
        ValueError: if `read_table` raises it.
    """
    measured = [row.call for row in rows]
    kept = [row for row in read_table(path) if row.call not in measured]
    content = {"about": about, "routes": [asdict(row) for row in kept + rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")
    load_table.cache_clear()
