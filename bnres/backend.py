"""Which implementation runs: Triton kernels, interpreted Triton kernels, or ATen."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

BACKENDS = ("triton", "triton-interpreter", "aten")

_override: ContextVar[str | None] = ContextVar("bnres_backend", default=None)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def backend(device: torch.device | str | None = None) -> str:
    """The implementation that tensors on ``device`` take.

    Args:
        device: a device; by default the GPU if there is one, else the CPU.

    Returns:
        ``"triton"`` (GPU), ``"triton-interpreter"`` (``TRITON_INTERPRET=1``) or ``"aten"`` (CPU).
    """
    chosen = _override.get()
    if chosen is not None:
        return chosen
    if _interpreting():
        return "triton-interpreter"
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return "triton" if torch.device(device).type == "cuda" else "aten"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Overrides `backend` inside a ``with`` block; meant for tests and comparisons.

    Raises:
        ValueError: for a name that is not one of ``BACKENDS``.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def uses_kernels(x: Tensor) -> bool:
    """Whether ``x`` goes to our kernels."""
    if _override.get() is None and not _interpreting():
        return x.is_cuda
    return backend(x.device) != "aten"
