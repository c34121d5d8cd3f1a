"""Selects what runs a fused operation: Triton kernels, Triton's interpreter, or torch (ATen)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BACKENDS = ("triton", "triton-interpreter", "aten")

# Read only once, because Triton reads TRITON_INTERPRET when a kernel is defined and ignores later
# changes.
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

# The override is a global, because torch.compile recompiles if a global has changed, but not if a
# ContextVar has changed.
_override: str | None = None


def backend(device: torch.device | str | None = None) -> str:
    """Returns the name of the implementation that runs for tensors on ``device``.

    Args:
        device: a device; by default the GPU if there is one, else the CPU.

    Returns:
        Inside `use_backend`, the name given to it. Otherwise:

        - ``"triton-interpreter"`` if ``TRITON_INTERPRET=1`` was set in the environment when bnres
          was imported. Our kernels then run in Triton's interpreter on every device.
        - ``"triton"`` for a GPU, where our kernels run.
        - ``"aten"`` for a CPU, where torch's own operations run.
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
    """Makes fused operations use the backend ``name`` inside a ``with`` block, in all threads.

    This context is for tests and comparisons.

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
    """Whether our kernels run for ``x``, either compiled or in Triton's interpreter."""
    if _override is not None:
        return _override != "aten"
    return _INTERPRETING or x.is_cuda
