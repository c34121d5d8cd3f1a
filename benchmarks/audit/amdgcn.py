"""What a kernel's machine code for AMD says: registers, spills, access widths, matrix instructions."""

import re
from dataclasses import dataclass

FIELD = re.compile(r"\.(vgpr_count|[sv]gpr_spill_count):\s+(\d+)")
WIDE_ACCESS = re.compile(r"\b(?:global|buffer)_(load|store)_dwordx4\b")
MATRIX = re.compile(r"\bv_mfma_\w+")


@dataclass(frozen=True)
class AmdCode:
    """Resources of a kernel, and which of its instructions matter."""

    registers: int
    spills: int
    wide: frozenset[str]
    matrix: bool


def read(text: str) -> AmdCode:
    """Reads a kernel's assembly; ``wide`` has ``load`` and ``store`` where 16-byte ones are."""
    field = {name: int(value) for name, value in FIELD.findall(text)}
    return AmdCode(
        field["vgpr_count"],
        field["vgpr_spill_count"] + field["sgpr_spill_count"],
        frozenset(WIDE_ACCESS.findall(text)),
        MATRIX.search(text) is not None,
    )
