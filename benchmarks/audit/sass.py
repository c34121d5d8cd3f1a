"""What a kernel's machine code (NVIDIA's SASS) says: registers, spills, loads and when they are used."""

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
    """One instruction: where it lies, what it does, its operands."""

    address: int
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def access_bytes(self) -> int:
        """Bytes that one thread moves."""
        return next((BITS[m] for m in reversed(self.opcode.split(".")) if m in BITS), 32) // 8

    @property
    def written(self) -> set[int]:
        """Registers a load writes."""
        first = REGISTER.search(self.operands)
        if first is None:
            return set()
        start = int(first.group(1))
        return set(range(start, start + max(self.access_bytes // 4, 1)))

    @property
    def named(self) -> set[int]:
        """Registers that stand among the operands."""
        return {int(r) for r in REGISTER.findall(self.operands)}


@dataclass(frozen=True)
class Resources:
    """Registers of a thread, bytes of its stack (where spilled registers are), of shared memory."""

    registers: int
    stack: int
    shared_memory: int


@dataclass(frozen=True)
class MachineCode:
    """A kernel's resources and its instructions."""

    registers: int
    shared_memory: int
    instructions: list[Instruction]

    @property
    def spills(self) -> int:
        """Accesses to local memory."""
        return sum(i.name in ("LDL", "STL") for i in self.instructions)


@cache
def disassemble(cubin: bytes) -> MachineCode:
    """Reads a kernel's binary with the tools that triton's wheel carries."""
    resources = read_resources(cubin)
    instructions = parse_instructions(_cuobjdump("-sass", cubin))
    return MachineCode(resources.registers, resources.shared_memory, instructions)


def parse_instructions(text: str) -> list[Instruction]:
    """The instructions of a disassembly."""
    return [
        Instruction(int(address, 16), opcode, operands)
        for address, _, opcode, operands in INSTRUCTION.findall(text)
    ]


def read_resources(cubin: bytes) -> Resources:
    """What a kernel's binary says of its resources, without its code."""
    usage = _cuobjdump("-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump does not name the registers: {usage!r}")
    return Resources(*map(int, found.groups()))


def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [TOOLS / "cuobjdump", option, file.name], check=True, capture_output=True, text=True
        ).stdout


def load_bytes(instructions: list[Instruction], width: int) -> int:
    """Bytes a thread loads from global memory in accesses of ``width`` bytes."""
    return sum(
        width for i in instructions if i.name in ("LDG", "LDGSTS") and i.access_bytes == width
    )


def store_bytes(instructions: list[Instruction], width: int) -> int:
    """Bytes a thread stores to global memory in accesses of ``width`` bytes."""
    return sum(width for i in instructions if i.name == "STG" and i.access_bytes == width)


def async_bytes(instructions: list[Instruction]) -> int:
    """Bytes that a thread asks for by asynchronous copies."""
    return sum(i.access_bytes for i in instructions if i.name == "LDGSTS")


def bytes_before_first_use(instructions: list[Instruction]) -> int:
    """Bytes that a thread has asked for by plain loads when it first needs one of them."""
    pending: set[int] = set()
    asked = 0
    for i in instructions:
        if i.name == "LDG":
            asked += i.access_bytes
            pending |= i.written
        elif pending & i.named:
            break
    return asked
