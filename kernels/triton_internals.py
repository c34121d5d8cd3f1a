"""What bnres uses of triton that is not public, read in 3.6, 3.8 and 3.9."""

from typing import Any

import triton
from triton.compiler import CompiledKernel


def launch_parts(compiled: CompiledKernel) -> tuple[Any, Any, Any]:
    """What launches a compiled kernel, and its second and third arguments after the stream."""
    return compiled.run, compiled.function, compiled.packed_metadata


def takes_addresses() -> bool:
    """Whether a launcher takes an address in place of a tensor: triton's own do, a simulator's may not."""
    launcher = triton.runtime.driver.active.launcher_cls
    return getattr(launcher, "__module__", "").startswith("triton.backends.")


def current_stream(device: int) -> int:
    """The stream that kernels are launched on."""
    return triton.runtime.driver.active.get_current_stream(device)


def has_launch_hooks() -> bool:
    """Whether someone, a profiler, wants to be called around launches."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
