"""Whether kernels are interpreted, and whether triton's interpreter can run with the numpy here."""

import re
from importlib.metadata import version

import triton


def is_interpreting() -> bool:
    """Whether kernels that are defined now are interpreted.

    Raises:
        ImportError: if they are to be, but the interpreter can't run.
    """
    if not triton.knobs.runtime.interpret:
        return False
    check_versions(triton.__version__, version("numpy"))
    return True


def check_versions(triton_version: str, numpy_version: str) -> None:
    """Raises ImportError for a triton whose interpreter can't run with this numpy.

    Before triton 3.7 it asks for ``int(array)`` of one-dimensional arrays, which numpy 2.4 refuses.
    """
    if _release(triton_version) < (3, 7) and _release(numpy_version) >= (2, 4):
        raise ImportError(
            f"triton {triton_version}'s interpreter can't run with numpy {numpy_version}: "
            "it needs numpy < 2.4, or triton >= 3.7"
        )


def _release(version: str) -> tuple[int, ...]:
    """``"3.6.0+git1"`` as ``(3, 6)``."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
