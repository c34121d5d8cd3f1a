"""What the command says of an error: one line, and an exit code."""

import os

import torch

# The user's input was wrong, or something in its environment: disk, memory, a package, a process.
BAD_INPUT, BAD_ENVIRONMENT = 2, 1
# Where packages come from whose names are not what pip takes, or that an extra installs.
EXTRAS = dict.fromkeys(
    ("matplotlib", "mlxtend", "numpy", "PIL", "pooch", "requests", "safetensors", "sklearn"),
    "'bnres[train]'",
) | {"onnx": "onnxscript", "tensorboard": "'bnres[tensorboard]'"}


def describe(error: BaseException) -> str:
    """What went wrong in one line, and what to do if that is known."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"out of memory: {_first_line(error)}; take a smaller batch or image size"
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or str(error)).split(".")[0]
        return f"{name} is missing; install it with: pip install {EXTRAS.get(name, name)}"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def report(error: Exception) -> tuple[str, int]:
    """The line that the command prints for an error that ended it, and its exit code."""
    rank = os.environ.get("RANK") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    who = "bnres" if rank is None else f"bnres, process {rank}"
    if isinstance(error, ValueError):
        return f"{who}: {describe(error)}", BAD_INPUT
    known = isinstance(error, OSError | MemoryError | torch.OutOfMemoryError | ImportError)
    hint = "" if known else " (--traceback shows where)"
    return f"{who}: {describe(error)}{hint}", BAD_ENVIRONMENT
