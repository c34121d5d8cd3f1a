"""Unpickling of files that somebody else wrote: numbers, strings, containers and arrays of bytes.

numpy's own classes are not used to read its arrays, as a forged state of theirs can reach any memory.
"""

import io
import pickle
from math import prod
from typing import Any

import torch
from torch import Tensor


class _Dtype:
    """Stands for ``numpy.dtype``; only that of bytes is taken."""

    def __init__(self, spec: Any = None, *flags: Any) -> None:
        if spec not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of {spec!r}, where only bytes are permitted")

    def __setstate__(self, state: Any) -> None:
        """A dtype's state says nothing more of bytes."""


class _Array:
    """Stands for ``numpy.ndarray``."""

    tensor: Tensor

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, content = state
        if not isinstance(dtype, _Dtype) or is_fortran or not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array that is not of bytes, row after row")
        if not all(type(n) is int and n >= 0 for n in shape) or prod(shape) != len(content):
            raise pickle.UnpicklingError(f"an array of {shape} with {len(content)} bytes")
        table = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else None
        self.tensor = (torch.empty(0, dtype=torch.uint8) if table is None else table).view(shape)


def _reconstruct(*arguments: Any) -> _Array:
    """``numpy``'s function that makes an empty array, whose state follows."""
    return _Array()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """``codecs.encode`` as old pickles have bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("bytes in another way than as latin1")
    return text.encode("latin1")


# What the pickles of Python's CIFAR-10 name, in numpy's old spelling and in the new one.
STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _encode,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not permitted")
        return STAND_INS[module, name]


def load_arrays(content: bytes, source: str) -> Any:
    """A pickle's content, arrays of bytes in a dictionary as uint8 tensors.

    Args:
        content: the pickle; strings of Python 2 become bytes.
        source: its name, for errors.

    Raises:
        ValueError: if it is cut off or names anything else.
    """
    try:
        found = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a pickle can fail in any way
        raise ValueError(f"{source} can't be unpickled: {error}") from error
    if isinstance(found, dict):
        found = {
            k: getattr(v, "tensor", None) if isinstance(v, _Array) else v for k, v in found.items()
        }
    return found
