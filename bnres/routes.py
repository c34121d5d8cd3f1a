"""Which way a convolution with an epilogue takes: torch's convolution and our passes, or our kernel.

A table for each GPU says for which shapes our kernel was measured to be faster, and with which
configuration. `bnres tune` fills it; it is in the user's cache folder, or where ``BNRES_ROUTES`` says.
torch's convolution takes what was not measured, what torch.compile captures, which cannot read a file,
and fp32 where torch may not round it to TF32 (``torch.backends.cudnn.allow_tf32``).
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
    """What the measured time of a convolution depends on."""

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
        """A name for tables."""
        s = self.shape
        return (
            f"{self.dtype} {self.batch}x{self.channels}x{self.height}x{self.width} -> "
            f"{self.out_channels} kernel {s.kernel_h}x{s.kernel_w} stride {s.stride_h}x{s.stride_w} "
            f"padding {s.padding_h}x{s.padding_w} dilation {s.dilation_h}x{s.dilation_w}"
            f"{' residual' if self.has_residual else ''}"
        )


@dataclass(frozen=True)
class Measured:
    """A row of a table: what was measured of one call.

    Attributes:
        call: which.
        config: the fastest configuration of our kernel, or None if none worked.
        kernel_ms: its time, or None.
        torch_ms: that of torch's convolution and our apply.
        failed: why a configuration does not count, by its name.
        left_out: names of configurations for which there was no time.
    """

    call: ConvCall
    config: ConvConfig | None
    kernel_ms: float | None
    torch_ms: float
    failed: dict[str, str]
    left_out: list[str]


@contextmanager
def use_conv_route(route: str) -> Iterator[None]:
    """Overrides the table inside a ``with`` block, for every thread.

    Args:
        route: ``"torch"``, ``"kernel"`` (wherever our kernel takes the input) or ``"auto"``.

    Raises:
        ValueError: for another name.
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
    """The route that `use_conv_route` has set."""
    return _override


def kernel_config(call: ConvCall, device: torch.device) -> tuple[bool, ConvConfig | None]:
    """Whether ``call`` goes to our kernel, and its configuration (None: the heuristic's)."""
    if _override != "auto":
        return _override == "kernel", None
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False, None
    config = load_table(table_path(gpu_name(device))).get(call)
    return config is not None, config


@cache
def gpu_name(device: torch.device) -> str:
    """The GPU's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def table_path(gpu: str) -> Path:
    """Where the table of a GPU lies."""
    override = os.environ.get("BNRES_ROUTES")
    if override:
        return Path(override)
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "bnres" / f"routes-{gpu}.json"


@cache
def load_table(path: Path) -> dict[ConvCall, ConvConfig]:
    """The calls for which our kernel is the faster, and its configurations; read once.

    Raises:
        ValueError: as `read_table`.
    """
    return {
        row.call: row.config
        for row in read_table(path)
        if row.config is not None and row.kernel_ms is not None and row.kernel_ms < row.torch_ms
    }


def read_table(path: Path) -> list[Measured]:
    """The rows of a table, none if there is no file.

    Raises:
        ValueError: for a file that is not such a table.
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
    """Writes measured rows, in place of older ones of the same calls; all or nothing.

    Args:
        path: the table; other rows in it stay.
        rows: what was measured.
        about: what they were measured on.

    Raises:
        ValueError: as `read_table`.
    """
    measured = [row.call for row in rows]
    kept = [row for row in read_table(path) if row.call not in measured]
    content = {"about": about, "routes": [asdict(row) for row in kept + rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")
    load_table.cache_clear()
