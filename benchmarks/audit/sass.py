"""Reads instructions, registers and stack size from a kernel's machine code for NVIDIA (SASS)."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*([^;]*);")
REGISTER = re.compile(r"\bR(\d+)\b")
BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}


@dataclass(frozen=True)
class Instruction:
    """One instruction of machine code."""

    address: int
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def access_bytes(self) -> int:
        """The bytes that one thread moves, if the instruction is a load or a store."""
        return next((BITS[m] for m in reversed(self.opcode.split(".")) if m in BITS), 32) // 8

    @property
    def written(self) -> set[int]:
        """The registers that the instruction writes, if it is a load."""
        first = REGISTER.search(self.operands)
        if first is None:
            return set()
        start = int(first.group(1))
        return set(range(start, start + max(self.access_bytes // 4, 1)))

    @property
    def named(self) -> set[int]:
        """The registers that occur in the operands."""
        return {int(r) for r in REGISTER.findall(self.operands)}


@dataclass(frozen=True)
class MachineCode:
    """A kernel's instructions, and the number of registers of a thread."""

    registers: int
    instructions: list[Instruction]

    @property
    def spills(self) -> int:
        """Number of instructions that access local memory."""
        return sum(i.name in ("LDL", "STL") for i in self.instructions)


@cache
def disassemble(cubin: bytes) -> MachineCode:
    """Disassembles a kernel's binary with the tools in triton's wheel."""
    registers, _ = registers_and_stack(cubin)
    return MachineCode(registers, parse_instructions(_cuobjdump("-sass", cubin)))


def parse_instructions(text: str) -> list[Instruction]:
    """Parses the instructions of a disassembly."""
    return [
        Instruction(int(address, 16), opcode, operands)
        for address, _, opcode, operands in INSTRUCTION.findall(text)
    ]


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """Returns a thread's registers, and the bytes of its stack, where spilled registers are stored.

    Raises:
        ValueError: if the output of cuobjdump does not have these numbers.
    """
    usage = _cuobjdump("-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump must print REG and STACK, got {usage!r}")
    return int(found[1]), int(found[2])


def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [TOOLS / "cuobjdump", option, file.name], check=True, capture_output=True, text=True
        ).stdout


def async_bytes(instructions: list[Instruction]) -> int:
    """Counts the bytes that a thread loads with asynchronous copies."""
    return sum(i.access_bytes for i in instructions if i.name == "LDGSTS")


def bytes_before_first_use(instructions: list[Instruction]) -> int:
    """Counts the bytes that a thread starts to load before it first uses a loaded value.

    Asynchronous copies are not counted.
    """
    pending: set[int] = set()
    asked = 0
    for i in instructions:
        if i.name == "LDG":
            asked += i.access_bytes
            pending |= i.written
        elif pending & i.named:
            break
    return asked
