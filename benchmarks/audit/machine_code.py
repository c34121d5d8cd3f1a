"""Compiles what a ResNet step launches, for a GPU that need not be there, and reads the code.

``python -m benchmarks.audit.machine_code`` prints a table; exit code 1 if a kernel spills, moves
activations in narrow accesses, keeps too few bytes in flight, or, a convolution, lacks matrix
instructions or asynchronous copies.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.audit.operations import steps
from benchmarks.audit.sass import (
    async_bytes,
    bytes_before_first_use,
    disassemble,
    load_bytes,
    store_bytes,
)
from benchmarks.audit.standin import GFX942, SM80, SM90, SM100, Gpu, Launch, compile_only
from benchmarks.sites import RESNET18_SITES, Site
from bnres import models
from bnres.kernels.conv import conv_bn_act
from bnres.kernels.norm import Norm
from bnres.routes import ConvCall
from bnres.tune import conv_calls

CONV_INPUT = (256, 3, 224, 224)
DTYPES = (torch.bfloat16, torch.float32)
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
GPUS = {gpu.name: gpu for gpu in (SM80, SM90, SM100, GFX942)}

# Bandwidth times latency, about 4.3 TB/s · 0.8 µs over 132 multiprocessors, and some to spare.
BYTES_IN_FLIGHT = 32 * 1024
WIDE = 16
# A mask has one bit for each element: 1/16 of a 16-bit tensor's bytes.
MASK_SHARE = 1 / 16
# A pooling's positions have 8 bits for each element, beside at least two 16-bit tensors.
INDEX_SHARE = 1 / 2
# What multiplies matrices, by architecture, with 16-bit and with tf32 operands.
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTC"}
RESERVED_SHARED = 1024
REGISTER_UNIT = 8


@dataclass(frozen=True)
class Case:
    """The operations of one site, whose launches are compiled."""

    site: Site
    batch: int
    layout: str
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.site.name} {self.site.operation} {self.layout} {dtype} batch {self.batch}"


@dataclass(frozen=True)
class Row:
    """One compiled kernel.

    Attributes:
        narrow: bytes moved in accesses of less than 16 bytes, for each one moved in such of 16;
            loads and stores apart, the greater of both.
        in_flight: bytes of loads that a multiprocessor has under way (0: not known).
        wanted: what ``in_flight`` has to be at least.
        missing: what a convolution's main loop lacks.
    """

    gpu: str
    kernel: str
    case: str
    registers: int
    shared_memory: int
    spills: int
    narrow: float
    in_flight: int
    wanted: int
    missing: str = ""

    @property
    def failures(self) -> list[str]:
        found = [f"no {self.missing}"] if self.missing else []
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.narrow > (INDEX_SHARE if "pool" in self.kernel else MASK_SHARE):
            found.append("narrow accesses")
        if self.in_flight < self.wanted:
            found.append(f"{self.in_flight} of {self.wanted} bytes in flight")
        return found


def is_finalize(launch: Launch) -> bool:
    """Whether a kernel handles per-channel buffers alone."""
    return "finalize" in launch.kernel


def empty(case: Case) -> Tensor:
    """A tensor of the case's shape whose memory is never touched."""
    return torch.empty(
        case.site.shape(case.batch), dtype=case.dtype, memory_format=LAYOUTS[case.layout]
    )


def launch_step(case: Case) -> None:
    """Forward in training, forward in evaluation and backward of a site."""
    for step in steps(case.site.operation, lambda: empty(case)).values():
        step()


def launch_conv(call: ConvCall) -> None:
    """A convolution of a model, in evaluation."""
    dtype, last = getattr(torch, call.dtype), torch.channels_last

    def tensor(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, memory_format=last)

    channel = torch.empty(call.out_channels)
    size = call.shape.output_size(call.height, call.width)
    residual = tensor(call.batch, call.out_channels, *size) if call.has_residual else None
    conv_bn_act(
        tensor(call.batch, call.channels, call.height, call.width),
        tensor(call.out_channels, call.channels, call.shape.kernel_h, call.shape.kernel_w),
        None, Norm(channel, channel, channel, channel), 1e-5, residual, "relu", 0.0, call.shape,
    )  # fmt: skip


def read_row(gpu: Gpu, case: Case, launch: Launch) -> Row:
    asm = launch.compiled.asm
    if gpu.target.backend == "hip":
        return _read_amd(gpu, case, launch, asm["amdgcn"])
    code = disassemble(asm["cubin"])
    if is_finalize(launch):
        return Row(
            gpu.name, launch.kernel, str(case), code.registers, code.shared_memory, code.spills,
            0.0, 0, 0,
        )  # fmt: skip
    loop = code.loop
    narrow = max(
        sum(count(loop, width) for width in (1, 2, 4, 8)) / max(count(loop, WIDE), 1)
        for count in ((load_bytes, store_bytes) if stores_tensor(launch) else (load_bytes,))
    )
    shared = launch.compiled.metadata.shared + RESERVED_SHARED
    threads = launch.compiled.metadata.num_warps * gpu.target.warp_size
    programs = launch.grid[0] * launch.grid[1]
    resident = min(
        gpu.registers // (-(-code.registers // REGISTER_UNIT) * REGISTER_UNIT * threads),
        gpu.shared_memory // shared,
        gpu.max_threads // threads,
        gpu.max_programs,
        -(-programs // gpu.sm_count),
    )
    # Copies of the next stages are under way while a stage is worked on.
    per_thread = bytes_before_first_use(loop)
    per_thread += async_bytes(loop) * (launch.arguments["STAGES"] - 1)
    tensors = 1 if launch.kernel == "_bn_stats_kernel" else loaded_tensors(launch)
    share = tensors * case.site.channels * case.site.size**2 * case.batch
    share = share * case.dtype.itemsize // gpu.sm_count
    return Row(
        gpu.name,
        launch.kernel,
        str(case),
        code.registers,
        shared,
        code.spills,
        narrow,
        resident * threads * per_thread,
        min(BYTES_IN_FLIGHT, share),
    )


def read_conv(gpu: Gpu, call: ConvCall, launch: Launch) -> Row:
    """A convolution: matrix instructions fed by 16-byte asynchronous copies, or by TMA."""
    code = disassemble(launch.compiled.asm["cubin"])
    names = [i.name for i in code.loop]
    copies = [i for i in code.loop if i.name == "LDGSTS"]
    missing = []
    if not any(name.startswith(MATRIX_INSTRUCTION[int(gpu.target.arch)]) for name in names):
        missing.append("matrix instructions")
    if "UTMALDG" not in names and not (copies and all(i.access_bytes == WIDE for i in copies)):
        missing.append("16-byte asynchronous copies")
    return Row(
        gpu.name, launch.kernel, call.key, code.registers,
        launch.compiled.metadata.shared + RESERVED_SHARED, code.spills, 0.0, 0, 0,
        " and no ".join(missing),
    )  # fmt: skip


def loaded_tensors(launch: Launch) -> int:
    """Activation tensors that a kernel reads."""
    names = ("x_ptr", "dy_ptr", "dy_skip_ptr", "residual_ptr", "x_a_ptr", "x_b_ptr")
    return sum(launch.arguments.get(name) is not None for name in names)


def stores_tensor(launch: Launch) -> bool:
    """Whether a kernel writes an activation tensor."""
    names = ("y_ptr", "dx_ptr", "dz_ptr", "dx_a_ptr")
    return any(launch.arguments.get(name) is not None for name in names)


def _read_amd(gpu: Gpu, case: Case, launch: Launch, text: str) -> Row:
    """Spills, and whether there are 16-byte accesses at all: of AMD's code no more is read."""
    field = {
        name: int(value)
        for name, value in re.findall(r"\.(vgpr_count|[sv]gpr_spill_count):\s+(\d+)", text)
    }
    wide_kinds = set(re.findall(r"\b(?:global|buffer)_(load|store)_dwordx4\b", text))
    kinds = ("load", "store") if stores_tensor(launch) else ("load",)
    wide = is_finalize(launch) or wide_kinds.issuperset(kinds)
    return Row(
        gpu.name,
        launch.kernel,
        str(case),
        field["vgpr_count"],
        launch.compiled.metadata.shared,
        field["vgpr_spill_count"] + field["sgpr_spill_count"],
        0.0 if wide else 1.0,
        0,
        0,
    )


def audit(gpu: Gpu, cases: list[Case], convs: list[ConvCall]) -> list[Row]:
    """A row for each specialisation that the cases and the convolutions launch."""
    rows: list[Row] = []
    seen: set[tuple[str, int]] = set()

    def take(launch: Launch, programs: int, read: Callable[[Launch], Row]) -> None:
        key = (launch.compiled.hash, programs)
        if key not in seen:
            seen.add(key)
            rows.append(read(launch))

    on_amd = gpu.target.backend == "hip"
    for case in cases:
        if on_amd and case.site.operation == "bn_relu_pool":
            continue  # compiled there it is narrow; nobody has looked into it yet
        launches: list[Launch] = []
        with compile_only(gpu, launches.append):
            launch_step(case)
        for launch in launches:
            programs = min(launch.grid[0] * launch.grid[-1], 32 * gpu.sm_count)
            take(launch, 0 if is_finalize(launch) else programs, partial(read_row, gpu, case))
    for call in [] if on_amd else convs:
        launches = []
        with compile_only(gpu, launches.append):
            launch_conv(call)
        for launch in launches:
            take(launch, 0, partial(read_conv, gpu, call))
    return rows


def operations_at(site: Site) -> list[Site]:
    """The fused operations at a site of the stock net."""
    fused = {
        "bn": ["dual_bn_add_relu"],
        "bn_add_relu": ["bn_add_relu", "bn_add_relu_twice"],
        "bn_relu": ["bn_relu", "bn_relu_pool"] if site.name == "stem" else ["bn_relu"],
    }
    return [replace(site, operation=operation) for operation in fused[site.operation]]


def all_cases() -> list[Case]:
    """Every operation at every site, and what another batch, layout or type makes of it."""
    bf16, fp32 = DTYPES
    variants = (
        (256, "channels_last", bf16),
        (32, "channels_last", bf16),
        (256, "contiguous", bf16),
        (256, "channels_last", fp32),
    )
    return [
        Case(fused, batch, layout, dtype)
        for batch, layout, dtype in variants
        for site in RESNET18_SITES
        for fused in operations_at(site)
        # A contiguous pooling gathers, and is wide nowhere.
        if not (fused.operation == "bn_relu_pool" and layout == "contiguous")
    ]


def family_cases() -> list[Case]:
    """One case for each kernel family."""
    sites = {fused.operation: fused for site in RESNET18_SITES for fused in operations_at(site)}
    names = ("bn_relu_pool", "bn_add_relu_twice", "dual_bn_add_relu")
    return [Case(sites[name], 256, "channels_last", torch.bfloat16) for name in names]


def all_convs() -> list[ConvCall]:
    """Every convolution of ResNet-18 and ResNet-50 that the kernel takes."""
    return [
        call
        for name in ("resnet18", "resnet50")
        for dtype in DTYPES
        for call in conv_calls(models.create_model(name, fused=False), CONV_INPUT, dtype)
    ]


def family_convs() -> list[ConvCall]:
    """A 3×3 convolution of layer1 and one of layer4, with a residual, in bf16."""
    calls = [c for c in all_convs() if c.has_residual and c.dtype == "bfloat16"]
    return [next(c for c in calls if c.channels == n and c.shape.taps == 9) for n in (64, 512)]


def format_table(rows: list[Row]) -> str:
    lines = [
        f"{'gpu':7} {'kernel':26} {'regs':>4} {'smem':>6} {'spills':>6} {'narrow':>6} "
        f"{'KB in flight':>12} {'wanted':>6}  case"
    ]
    lines += [
        f"{r.gpu:7} {r.kernel:26} {r.registers:4} {r.shared_memory:6} {r.spills:6} "
        f"{r.narrow:6.3f} {r.in_flight / 1024:12.1f} {r.wanted / 1024:6.1f}  {r.case}"
        f"{'  FAILS: ' + ', '.join(r.failures) if r.failures else ''}"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gpu", choices=GPUS, action="append", help="default: sm_90")
    parser.add_argument("--families", action="store_true", help="one case for each kernel family")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    options = parser.parse_args()
    cases = family_cases() if options.families else all_cases()
    convs = family_convs() if options.families else all_convs()
    rows = [row for name in options.gpu or ["sm_90"] for row in audit(GPUS[name], cases, convs)]
    if options.json:
        print(json.dumps([{**asdict(row), "failures": row.failures} for row in rows]))
    else:
        print(format_table(rows))
    return int(any(row.failures for row in rows))


if __name__ == "__main__":
    sys.exit(main())
