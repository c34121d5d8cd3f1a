"""Describes the device, versions and commit of a run, and measures the device's ceilings.

The ceilings are the bandwidth of a copy and the FLOP/s of a matrix product.
"""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

import bnres
from benchmarks import clock

ROOT = Path(__file__).parent.parent
# Results can share a folder only if these fields of their environments are equal.
IDENTITY = ("device", "torch", "triton", "bnres", "commit", "backend")
GIB = 1 << 30
MIB = 1 << 20


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> dict[str, Any]:
    """Describes a device and the software that is installed."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "bnres": bnres.__version__,
        "backend": bnres.backend(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    if device.type != "cuda":
        return {"device": _cpu_name(), "threads": torch.get_num_threads(), **found}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        **found,
    }


def clocks() -> str:
    """Returns the GPU's current clock rates and its power limit, as nvidia-smi prints them."""
    return _output(
        "nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"
    )


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """Measures the bandwidth of a copy and the speed of a matrix product on random data.

    The product is in bf16 on a GPU, and in fp32 on a CPU.

    Returns:
        ``copy`` is the number of bytes read plus the number of bytes written, per second.
        ``product`` is in FLOP/s.
    """
    on_gpu = device.type == "cuda"
    size, edge = (2 * GIB, 8192) if on_gpu else (32 * MIB, 1024)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _median(lambda: target.copy_(source), device)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    product = _median(lambda: a @ b, device)
    return {"copy": 2 * size / copy, "product": 2 * edge**3 / product}


def _median(call: clock.Call, device: torch.device) -> float:
    ticking = clock.DeviceClock()
    timed = clock.prepare(ticking, lambda: call, device)
    return sorted(clock.durations(ticking, timed, 15))[7]


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Returns the commit, followed by ``+changes`` if tracked files were changed.

    If the environment variable ``BNRES_COMMIT`` is set, its value is returned instead. Set it in a
    copy of the project that has no git history.
    """
    if os.environ.get("BNRES_COMMIT"):
        return os.environ["BNRES_COMMIT"]
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if changed else commit


def _output(*command: str) -> str:
    """Returns a command's output, or an empty string if the command is not installed or fails."""
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
