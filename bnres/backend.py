"""Selects the implementation: Triton kernels, interpreted Triton kernels, or ATen."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BACKENDS = ("triton", "triton-interpreter", "aten")

# Read once: Triton reads the variable when a kernel is defined, and both must agree.
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

# A global, not a ContextVar, so that torch.compile guards on it.
_override: str | None = None


def backend(device: torch.device | str | None = None) -> str:
    """The implementation that runs for tensors on ``device``.

    Args:
        device: a device; by default the GPU if there is one, else the CPU.

    Returns:
        ``"triton"`` (GPU), ``"triton-interpreter"`` (``TRITON_INTERPRET=1`` in the environment
        when bnres is imported) or ``"aten"`` (CPU).
    """
    if _override is not None:
        return _override
    if _INTERPRETING:
        return "triton-interpreter"
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return "triton" if torch.device(device).type == "cuda" else "aten"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Overrides `backend` inside a ``with`` block, in all threads; for tests and comparisons.

    Raises:
        ValueError: for a name that is not one of ``BACKENDS``.
    """
    global _override
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    before, _override = _override, name
    try:
        yield
    finally:
        _override = before


def uses_kernels(x: Tensor) -> bool:
    """Whether our kernels run for ``x``, interpreted or not."""
    if _override is not None:
        return _override != "aten"
    return _INTERPRETING or x.is_cuda
