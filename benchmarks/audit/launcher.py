"""Runs triton's own launcher with a stand-in for CUDA's driver library that launches nothing.

The launcher is written in C. It converts the arguments of a launch and passes them to the driver.
With the stand-in, it runs as on a GPU.
"""

import ctypes
import os
import re
import subprocess
from pathlib import Path

from triton.backends.nvidia import driver as nvidia

from benchmarks.audit.standin import Gpu, StandInDriver

# The source of the stand-in library. Each function returns 0, which means success.
LAUNCH = "cuLaunchKernelEx"
SOURCE = """
static long launches;
long count_launches(void) {{ return launches; }}
int {launch}(void) {{ launches++; return 0; }}
{others}
"""


def build_driver_library(folder: Path) -> ctypes.CDLL:
    """Builds a stand-in ``libcuda.so.1`` in ``folder``, loads it and makes triton link with it."""
    sources = Path(nvidia.__file__).parent.glob("driver.*")
    text = "".join(
        path.read_text(encoding="utf-8") for path in sources if path.suffix in (".c", ".py")
    )
    names = set(re.findall(r"\bcu[A-Z][A-Za-z0-9]*", text)) - {LAUNCH}
    others = "\n".join(f"int {name}(void) {{ return 0; }}" for name in sorted(names))
    source, library = folder / "cuda.c", folder / "libcuda.so.1"
    source.write_text(SOURCE.format(launch=LAUNCH, others=others), encoding="utf-8")
    options = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["gcc", *options, "-o", library, source], check=True, capture_output=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


class _Utils:
    """Stand-ins for the functions of triton's driver that load a compiled kernel."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        cuda = nvidia.CudaUtils()
        for name in ("launch", "build_signature_metadata"):  # triton > 3.6 has these
            if hasattr(cuda, name):
                setattr(self, name, getattr(cuda, name))

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.gpu.shared_memory - 1024}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads


class LaunchingDriver(StandInDriver):
    """A `StandInDriver` for triton's own launcher, which calls the stand-in ``libcuda.so.1``."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__(gpu)
        self.utils = _Utils(gpu)
