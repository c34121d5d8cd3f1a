"""Unpickles files from other people safely.

Only numbers, strings, containers and arrays of bytes are permitted. Pickled numpy arrays are read
without numpy. With numpy, an array whose pickled state is forged could access any memory.
"""

import io
import pickle
from math import prod
from typing import Any

import torch
from torch import Tensor


class _Dtype:
    """Replaces ``numpy.dtype``. Only uint8 is permitted."""

    def __init__(self, spec: Any = None, *flags: Any) -> None:
        if spec not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"arrays must be of uint8, got {spec!r}")

    def __setstate__(self, state: Any) -> None:
        """Ignores the pickled state, which uint8 does not need."""


class _Array:
    """Replaces ``numpy.ndarray``. ``tensor`` holds the content of the array."""

    tensor: Tensor

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, content = state
        if not isinstance(dtype, _Dtype) or is_fortran or not isinstance(content, bytes):
            raise pickle.UnpicklingError("arrays must be of uint8 in C order")
        if not all(type(n) is int and n >= 0 for n in shape) or prod(shape) != len(content):
            raise pickle.UnpicklingError(f"an array of shape {shape} has {len(content)} bytes")
        table = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else None
        self.tensor = (torch.empty(0, dtype=torch.uint8) if table is None else table).view(shape)


def _reconstruct(*arguments: Any) -> _Array:
    """Replaces numpy's function that creates an array before pickle sets the array's state."""
    return _Array()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Replaces ``codecs.encode``, which old pickle protocols call to restore bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(
            f"bytes must be a str encoded as latin1, got {type(text).__name__} and {encoding!r}"
        )
    return text.encode("latin1")


# These are the replacements for the classes and functions that pickles of CIFAR-10 refer to, by
# module and name. _reconstruct occurs twice, because its module has one name in numpy 1 and another
# name in numpy 2.
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
            raise pickle.UnpicklingError(f"it uses {module}.{name}, which is not permitted")
        return STAND_INS[module, name]


def load_arrays(content: bytes, source: str) -> Any:
    """Returns the content of a pickle. If it is a dictionary, its arrays become uint8 tensors.

    Args:
        content: the pickle. Strings of Python 2 become bytes.
        source: name of the pickle, for errors.

    Raises:
        ValueError: if the pickle is truncated, or holds an object that is not permitted.
    """
    try:
        found = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{source} can't be unpickled: {error}") from error
    if isinstance(found, dict):
        found = {
            k: getattr(v, "tensor", None) if isinstance(v, _Array) else v for k, v in found.items()
        }
    return found
