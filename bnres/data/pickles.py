"""Unpickling of files that somebody else wrote."""

import io
import pickle
from typing import Any

# What the pickles of Python's CIFAR-10 name, in numpy's old spelling and in the new one.
PERMITTED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PERMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not permitted")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def load_arrays(content: bytes, source: str) -> Any:
    """A pickle of numbers, strings, containers and numpy arrays, which can run no code.

    Args:
        content: the pickle; strings of Python 2 become bytes.
        source: its name, for errors.

    Raises:
        ValueError: if it is cut off or names anything else.
    """
    try:
        return _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a pickle can fail in any way
        raise ValueError(f"{source} can't be unpickled: {error}") from error
