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
        ValueError: for a file that is no such table.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["routes"]
        return {
            _call(row["call"]): ConvConfig(**row["config"])
            for row in rows
            if row["kernel_ms"] < row["torch_ms"]
        }
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a table of routes of this version: {error!r}; delete it, then run "
            "bnres tune"
        ) from error


def _call(fields: dict[str, Any]) -> ConvCall:
    return ConvCall(**{**fields, "shape": ConvShape(**fields["shape"])})


def save_table(path: Path, rows: list[dict[str, Any]], about: dict[str, str]) -> None:
    """Writes measured rows, in place of older ones of the same calls; all or nothing.

    Args:
        path: the table; other rows in it stay.
        rows: each with ``call`` (`ConvCall`), ``config`` (`ConvConfig`), ``kernel_ms``,
            ``torch_ms``.
        about: what they were measured on.
    """
    fresh = [{**row, "call": asdict(row["call"]), "config": asdict(row["config"])} for row in rows]
    measured = [row["call"] for row in fresh]
    kept = []
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))["routes"]
        kept = [row for row in old if row["call"] not in measured]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"about": about, "routes": kept + fresh}, indent=1) + "\n")
    partial.replace(path)
    load_table.cache_clear()
