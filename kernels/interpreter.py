"""Finds out whether kernels are interpreted, and whether the interpreter works with this numpy."""

import re
from importlib.metadata import version

import triton


def is_interpreting() -> bool:
    """Whether triton interprets the kernels that are defined from now on.

    Raises:
        ImportError: if triton interprets, but its interpreter can't run with the installed numpy.
    """
    if not triton.knobs.runtime.interpret:
        return False
    check_versions(triton.__version__, version("numpy"))
    return True


def check_versions(triton_version: str, numpy_version: str) -> None:
    """Raises ImportError if this triton's interpreter can't run with this numpy.

    Before triton 3.7, the interpreter calls ``int(array)`` on one-dimensional arrays. Since numpy
    2.4, this call raises an error.
    """
    if _release(triton_version) < (3, 7) and _release(numpy_version) >= (2, 4):
        raise ImportError(
            f"triton {triton_version}'s interpreter can't run with numpy {numpy_version}: "
            "it needs numpy < 2.4, or triton >= 3.7"
        )


def _release(version: str) -> tuple[int, ...]:
    """Returns the first two numbers of a version: ``(3, 6)`` for ``"3.6.0+git1"``."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
