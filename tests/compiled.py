"""Starts a new Python process in which kernels are compiled, not interpreted.

Triton's interpreter and compiler can't be used in the same process.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_compiled(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs ``python *arguments`` in the repository's root, without triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
