"""Unpickles arrays of bytes without running code from the pickle."""

import io
import pickle
from typing import Any


def _dtype(spec: Any, *flags: Any) -> Any:
    """Replaces ``numpy.dtype``. Only uint8 is permitted."""
    import numpy as np

    if spec not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"arrays must be of uint8, got {spec!r}")
    return np.dtype(np.uint8)


def _reconstruct(*arguments: Any) -> Any:
    """Replaces numpy's ``_reconstruct``: returns an empty array, which pickle fills afterwards."""
    import numpy as np

    return np.empty(0, np.uint8)


def _encode(text: str, encoding: str) -> bytes:
    """Replaces ``codecs.encode``, with which old pickle protocols restore bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes must be encoded as latin1, got {encoding!r}")
    return text.encode(encoding)


# The classes and functions named in CIFAR-10's pickles, and their replacements. numpy 1 and numpy 2
# have different names for the module of _reconstruct.
STAND_INS = {
    ("numpy", "ndarray"): None,  # used only as an argument of _reconstruct, which ignores it
    ("numpy", "dtype"): _dtype,
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
    """Returns the content of a pickle of numbers, strings, containers and uint8 arrays.

    Strings of Python 2 become bytes.

    Raises:
        ValueError: if the pickle is truncated, or holds an object that is not permitted.
    """
    try:
        return _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{source} can't be unpickled: {error}") from error
