"""Runs code that compiles kernels in a new process, without triton's interpreter.

The interpreter and the compiler can't share a process.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_compiled(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs ``python *arguments`` in the repository's root, without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
