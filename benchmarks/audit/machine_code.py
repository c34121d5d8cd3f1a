"""Compiles what a ResNet-18 step launches, for a GPU that need not be there, and reads the code.

``python -m benchmarks.audit.machine_code`` prints a table; exit code 1 if a kernel spills, moves
activations in narrow accesses, or keeps too few bytes in flight.
"""

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.audit.sass import (
    async_bytes,
    bytes_before_first_use,
    disassemble,
    load_bytes,
    store_bytes,
)
from benchmarks.audit.standin import GFX942, SM80, SM90, SM100, Gpu, Launch, compile_only
from benchmarks.sites import RESNET18_SITES, Site
from bnres.kernels.bn_forward import mask_bytes
from bnres.kernels.layout import channel_view
from bnres.ops import batch_norm_act as ops

BATCHES = (256, 32)
DTYPES = (torch.bfloat16, torch.float32)
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
GPUS = {gpu.name: gpu for gpu in (SM80, SM90, SM100, GFX942)}

# Bandwidth times latency, about 4.3 TB/s · 0.8 µs over 132 multiprocessors, and some to spare.
BYTES_IN_FLIGHT = 32 * 1024
WIDE = 16
# A mask has one bit for each element: 1/16 of a 16-bit tensor's bytes.
MASK_SHARE = 1 / 16
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

    @property
    def failures(self) -> list[str]:
        found = []
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.narrow > MASK_SHARE:
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
    x, channel = empty(case), torch.empty(case.site.channels)
    residual = empty(case) if case.site.operation == "bn_add_relu" else None
    act = "identity" if case.site.operation == "bn" else "relu"
    for training, needs_grad in ((False, False), (True, True)):
        _, mean, rstd, mask = ops.forward_impl(
            x, channel, channel, residual, channel, channel, None, 0.1, training, 1e-5, act, 0.0,
            needs_grad,
        )  # fmt: skip
    if residual is not None:
        assert mask.numel() == mask_bytes(channel_view(x), x.element_size())
    ops.backward_impl(
        x, None, x, channel, channel, None, mean, rstd, mask if residual is not None else None, True,
        act, 0.0, True, residual is not None, True,
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


def loaded_tensors(launch: Launch) -> int:
    """Activation tensors that a kernel reads."""
    names = ("x_ptr", "dy_ptr", "residual_ptr")
    return sum(launch.arguments.get(name) is not None for name in names)


def stores_tensor(launch: Launch) -> bool:
    """Whether a kernel writes an activation tensor."""
    names = ("y_ptr", "dx_ptr", "dz_ptr")
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


def audit(gpu: Gpu, cases: list[Case]) -> list[Row]:
    """A row for each specialisation that the cases launch."""
    rows: list[Row] = []
    seen: set[tuple[str, int]] = set()
    for case in cases:
        launches: list[Launch] = []
        with compile_only(gpu, launches.append):
            launch_step(case)
        for launch in launches:
            programs = min(launch.grid[0] * launch.grid[-1], 32 * gpu.sm_count)
            key = (launch.compiled.hash, programs if not is_finalize(launch) else 0)
            if key not in seen:
                seen.add(key)
                rows.append(read_row(gpu, case, launch))
    return rows


def all_cases() -> list[Case]:
    """Every site, batch size, layout and type of the audit."""
    return [
        Case(site, batch, layout, dtype)
        for dtype in DTYPES
        for layout in LAYOUTS
        for batch in BATCHES
        for site in RESNET18_SITES
    ]


def family_cases() -> list[Case]:
    """One case in which every kernel family is launched."""
    return [Case(RESNET18_SITES[2], 256, "channels_last", torch.bfloat16)]


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
    rows = [row for name in options.gpu or ["sm_90"] for row in audit(GPUS[name], cases)]
    if options.json:
        print(json.dumps([{**asdict(row), "failures": row.failures} for row in rows]))
    else:
        print(format_table(rows))
    return int(any(row.failures for row in rows))


if __name__ == "__main__":
    sys.exit(main())
