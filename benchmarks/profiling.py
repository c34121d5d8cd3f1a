"""Profiles a training step: its kernel time by group, its launches and the GPU's idle time."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.autograd import DeviceType

# Groups of kernels (on a GPU) or of operators (on the CPU). A name belongs to the first group whose
# pattern it matches.
GROUPS = (
    ("batch norm", r"(?<!conv)_bn_|batch_?norm|bn_(fw|bw)|bnorm|bnres::"),
    ("pooling", r"pool"),
    (
        "convolution",
        r"conv|cudnn|xmma|cutlass|implicit|winograd|sgemm|gemm|dgrad|wgrad|fprop|nchwToNhwc|"
        r"nhwcToNchw|mkldnn|addmm|::mm$|nvjet",
    ),
    ("optimiser", r"multi_tensor|foreach|sgd|optimizer"),
)
OTHER = "other"
WARMUP_STEPS = 3
STEPS = 5


def group_of(name: str) -> str:
    """Returns the group of a kernel or an operator."""
    return next((g for g, pattern in GROUPS if re.search(pattern, name, re.IGNORECASE)), OTHER)


@dataclass
class Profile:
    """Means over the profiled steps. Times are in seconds.

    Attributes:
        kernels: time and number of launches of each kernel in a step. On the CPU, time and number
            of calls of each operator, without the time of the operators that it calls.
        span: time from the start of the first kernel to the end of the last kernel, divided by the
            number of steps. On the CPU it is 0.
        idle: part of the span in which no kernel ran.
    """

    kernels: dict[str, tuple[float, float]] = field(default_factory=dict)
    span: float = 0.0
    idle: float = 0.0


def profile(run: Callable[[], object], device: torch.device, trace: Path | None = None) -> Profile:
    """Profiles `STEPS` steps after a warm-up.

    Args:
        run: runs one step.
        device: device on which the step runs.
        trace: file for a Chrome trace of the steps.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = device.type == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for _ in range(WARMUP_STEPS if on_gpu else 1):
        run()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(STEPS):
            run()
        if on_gpu:
            torch.cuda.synchronize(device)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    found = Profile()
    spans = []
    for event in profiler.events() or []:
        if on_gpu:
            # The kernels inside an annotation have their own events.
            if event.device_type != DeviceType.CUDA or event.is_user_annotation:
                continue
            microseconds = event.time_range.elapsed_us()
            spans.append((event.time_range.start, event.time_range.end))
        else:
            microseconds = event.self_cpu_time_total
        seconds, launches = found.kernels.get(event.name, (0.0, 0.0))
        found.kernels[event.name] = (seconds + microseconds / 1e6 / STEPS, launches + 1 / STEPS)
    if spans:
        busy, end = 0.0, spans[0][0]
        for start, stop in sorted(spans):
            busy += max(stop - max(start, end), 0.0)
            end = max(end, stop)
        total = end - min(start for start, _ in spans)
        found.span, found.idle = total / 1e6 / STEPS, (total - busy) / 1e6 / STEPS
    return found


def format_profile(found: Profile, device: torch.device, top: int = 25) -> str:
    """Formats a table of the groups, followed by the ``top`` kernels that take the most time."""
    groups = {name: (0.0, 0.0) for name in (*(name for name, _ in GROUPS), OTHER)}
    for name, (seconds, launches) in found.kernels.items():
        before = groups[group_of(name)]
        groups[group_of(name)] = (before[0] + seconds, before[1] + launches)
    total, count = (sum(pair[i] for pair in groups.values()) for i in range(2))
    what = "launches" if device.type == "cuda" else "operators"
    lines = [f"{'group':14} {'ms':>9} {'share':>7} {what:>9}"]
    for group, (seconds, launches) in [*groups.items(), ("all", (total, count))]:
        lines.append(f"{group:14} {seconds * 1e3:9.3f} {seconds / total:7.1%} {launches:9.0f}")
    if found.span:
        lines.append(
            f"a step takes {found.span * 1e3:.3f} ms on the device, which is idle for "
            f"{found.idle * 1e3:.3f} ms of it ({found.idle / found.span:.1%})"
        )
    lines += ["", f"{'ms':>9} {what:>9}  {'group':12} kernel"]
    longest = sorted(found.kernels.items(), key=lambda kernel: -kernel[1][0])[:top]
    for name, (seconds, launches) in longest:
        lines.append(f"{seconds * 1e3:9.3f} {launches:9.0f}  {group_of(name):12} {name[:90]}")
    return "\n".join(lines)
