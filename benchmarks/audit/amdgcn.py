"""Reads registers, spills and matrix instructions from a kernel's code for AMD."""

import re
from dataclasses import dataclass

FIELD = re.compile(r"\.(vgpr_count|[sv]gpr_spill_count):\s+(\d+)")
MATRIX = re.compile(r"\bv_mfma_\w+")


@dataclass(frozen=True)
class AmdCode:
    """Resources and some instructions of a kernel.

    Attributes:
        registers: vector registers of a thread.
        spills: number of spilled registers, both vector and scalar registers.
        matrix: whether the kernel has matrix instructions.
    """

    registers: int
    spills: int
    matrix: bool


def read(text: str) -> AmdCode:
    """Parses a kernel's assembly."""
    field = {name: int(value) for name, value in FIELD.findall(text)}
    return AmdCode(
        field["vgpr_count"],
        field["vgpr_spill_count"] + field["sgpr_spill_count"],
        MATRIX.search(text) is not None,
    )
