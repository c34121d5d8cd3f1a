"""Validates the graphs of the cuDNN provider without cuDNN and without a GPU.

To validate a graph, cuDNN's frontend calls only the function that returns cuDNN's version. So a
stand-in library with this function is enough. ``python -m benchmarks.cudnn_graphs`` prints how many
graphs are valid.
"""

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT

# A handle of cuDNN needs a GPU. This release of the frontend also accepts a number as a graph's
# handle, so it can describe a graph without a GPU.
PACKAGE = "nvidia-cudnn-frontend==1.18.0"
SOURCE = """
#include <stddef.h>
size_t cudnnGetVersion(void) { return 91500; }
"""


def run() -> tuple[bool | None, str]:
    """Validates the graphs in a new process with the stand-in library.

    Returns:
        A tuple (valid, message). ``message`` is the last line that the process printed. If the
        frontend is not installed, ``valid`` is None, and ``message`` says so.
    """
    if find_spec("cudnn") is None:
        return None, f"{PACKAGE} is not installed"
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "cudnn.c", Path(folder) / "libcudnn.so.9"
        source.write_text(SOURCE, encoding="utf-8")
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
        result = subprocess.run(
            [sys.executable, "-m", "benchmarks.cudnn_graphs"], cwd=ROOT, text=True,
            env=os.environ | {"LD_LIBRARY_PATH": folder}, capture_output=True,
        )  # fmt: skip
    output = result.stdout if result.returncode == 0 else result.stderr
    return result.returncode == 0, output.strip().splitlines()[-1]


def main() -> None:
    """Validates forward and backward graphs of BN, BN+ReLU and BN+add+ReLU, in bf16 and in fp16."""
    import cudnn

    from benchmarks.providers.cudnn_frontend import Builder

    class Validator(Builder):
        def _build(self, graph: Any) -> int:
            return 0

    count = 0
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.empty(2, 8, 4, 4, dtype=dtype)
        for has_residual, has_relu in ((False, False), (False, True), (True, True)):
            builder = Validator(cudnn, x, has_residual, has_relu, 1)
            for graph in (builder.forward(), builder.backward()):
                count += len(graph.tensors) > 0
    print(f"{count} graphs are valid")


if __name__ == "__main__":
    main()
