"""Private parts of triton that bnres uses, checked in the sources of triton 3.6, 3.8 and 3.9."""

from typing import Any

import triton
from triton.compiler import CompiledKernel


def launch_parts(compiled: CompiledKernel) -> tuple[Any, Any, Any]:
    """Returns a compiled kernel's launcher, and the launcher's two arguments after the stream."""
    return compiled.run, compiled.function, compiled.packed_metadata


def takes_addresses() -> bool:
    """Whether the active launcher accepts addresses instead of tensors.

    Triton's launchers accept addresses, but the launcher of a simulator may not.
    """
    launcher = triton.runtime.driver.active.launcher_cls
    return getattr(launcher, "__module__", "").startswith("triton.backends.")


def current_stream(device: int) -> int:
    """Returns the stream on which triton launches kernels on a device."""
    return triton.runtime.driver.active.get_current_stream(device)


def has_launch_hooks() -> bool:
    """Whether hooks around launches are set, for example by a profiler."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
