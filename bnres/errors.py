"""Describes any error in one line, and chooses the exit code of the command ``bnres``."""

import os

import torch

# The exit code is 2 for wrong input by the user, and 1 for any other error, such as a file that
# can't be written, too little memory or a missing package.
BAD_INPUT, BAD_ENVIRONMENT = 2, 1
# Maps the name of a missing module to what pip must install: a package, or bnres with an extra.
EXTRAS = dict.fromkeys(
    ("matplotlib", "mlxtend", "numpy", "PIL", "pooch", "safetensors", "sklearn"),
    "'bnres[train]'",
) | {"onnx": "onnxscript", "tensorboard": "'bnres[tensorboard]'"}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the GPU or the CPU is out of memory.

    torch's CPU allocator raises a plain RuntimeError, which is recognised by its message.
    """
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def describe(error: BaseException) -> str:
    """Returns one line that says what went wrong, and how to fix it if that is known."""
    if is_out_of_memory(error):
        return f"out of memory: {first_line(error)}; use a smaller batch or image size"
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or str(error)).split(".")[0]
        return f"{name} is missing; install it with: pip install {EXTRAS.get(name, name)}"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return first_line(error)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message.

    If this line is not enough, the second line or the name of the error's class is added.
    """
    if type(error).__module__.startswith("torch._dynamo") and error.__cause__ is not None:
        # The first line of Dynamo's error says only where the original error was raised.
        error = error.__cause__
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return line if " " in line else f"{type(error).__name__}: {line}"


def report(error: Exception) -> tuple[str, int]:
    """Returns the line that the command prints for an error, and the exit code."""
    rank = os.environ.get("RANK") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    who = "bnres" if rank is None else f"bnres, process {rank}"
    if isinstance(error, ValueError):
        return f"{who}: {describe(error)}", BAD_INPUT
    known = isinstance(error, OSError | ImportError) or is_out_of_memory(error)
    hint = "" if known else " (--traceback shows where)"
    return f"{who}: {describe(error)}{hint}", BAD_ENVIRONMENT
