"""Selects the implementation: Triton kernels, interpreted Triton kernels, or ATen."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BACKENDS = ("triton", "triton-interpreter", "aten")

# The variable is read only once, at import. Triton reads it when a kernel is defined, so a later
# change must not have an effect here either.
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

# A global, not a ContextVar, because torch.compile notices a change only of a global.
_override: str | None = None


def backend(device: torch.device | str | None = None) -> str:
    """The implementation that runs for tensors on ``device``.

    Args:
        device: a device; by default the GPU if there is one, else the CPU.

    Returns:
        ``"triton-interpreter"`` for our kernels in Triton's interpreter, if ``TRITON_INTERPRET=1``
        was set in the environment when bnres was imported. Otherwise ``"triton"`` for our kernels
        on a GPU, or ``"aten"`` for torch's own operations on a CPU.
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
    """Overrides the result of `backend` inside a ``with`` block, in all threads.

    This is meant for tests and comparisons.

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
