"""What results were measured on: device, driver, versions, commit, and the device's two ceilings."""

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
# What two runs have to share for their results to lie in one folder.
IDENTITY = ("device", "torch", "triton", "bnres", "commit", "backend")
GIB = 1 << 30
MIB = 1 << 20


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> dict[str, Any]:
    """The record of a device and of the software on it."""
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
    """The GPU's clocks as they are now, and its power limit."""
    return _output(
        "nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"
    )


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """Bytes/s of a device-to-device copy, read and written, and FLOP/s of a matrix product.

    On a GPU 2 GiB and 8192³ in bf16, on random data; on the CPU 32 MiB and 1024³ in fp32.
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
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _read(path: str) -> str:
    file = Path(path)
    return file.read_text(encoding="utf-8") if file.exists() else ""


def _commit() -> str:
    """The commit, with ``+changes`` behind it where the tree is not clean.

    Where the tree has come without its history, ``BNRES_COMMIT`` says it.
    """
    if os.environ.get("BNRES_COMMIT"):
        return os.environ["BNRES_COMMIT"]
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if changed else commit


def _output(*command: str) -> str:
    """What a command prints; nothing if it is not there or fails."""
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
