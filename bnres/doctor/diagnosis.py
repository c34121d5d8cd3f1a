"""Finds problems of this machine, and suggests changes that save memory traffic in training."""

import json
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

import bnres
from bnres.doctor.checks import CHECKS, Finding, find_compiler, usable_inductor_cache
from bnres.doctor.savings import Savings, derive
from bnres.errors import describe

ROUTES = {
    "triton": "Triton kernels for GPU tensors, ATen for CPU tensors",
    "triton-interpreter": "Triton's interpreter for all tensors, which is slow",
    "aten": "ATen for CPU tensors; the kernels don't run",
}


def facts() -> dict[str, str]:
    """Returns facts about this machine by name."""
    on_gpu = torch.cuda.is_available()
    return {
        "GPU": torch.cuda.get_device_name() if on_gpu else "none",
        "driver": _driver() or "none",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "bnres": f"{bnres.__version__}, {Path(bnres.__file__).parent}",
        "C compiler": find_compiler() or "none",
        "backend": bnres.backend(),
        "route": ROUTES[bnres.backend()],
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.partition("\n")[0].strip()


@dataclass(frozen=True)
class Change:
    """A change to a training script.

    Attributes:
        do: what to change, in words.
        saves: bytes of memory traffic that the change saves for each image in a training step,
            computed from shapes. It is None if the number is not known.
    """

    do: str
    saves: int | None


def changes(savings: Savings) -> list[Change]:
    """Returns the changes that save memory traffic, the greatest known saving first."""
    found = [Change("fuse: model = bnres.fuse(model)", savings.stock_bytes - savings.fused_bytes)]
    if not savings.half:
        found.append(
            Change(
                "compute in bf16: with torch.autocast('cuda', torch.bfloat16):",
                savings.fused_bytes - savings.half_bytes,
            )
        )
    if not savings.channels_last:
        found.append(
            Change("convert model and input with .to(memory_format=torch.channels_last)", None)
        )
    known = [change for change in found if change.saves]
    unknown = [change for change in found if change.saves is None]
    return sorted(known, key=lambda change: -(change.saves or 0)) + unknown


@dataclass(frozen=True)
class Diagnosis:
    """What ``bnres doctor`` prints."""

    facts: dict[str, str]
    findings: list[Finding]
    model: str | None = None
    savings: Savings | None = None
    changes: list[Change] | None = None

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        lines = [f"{name + ':':<12}{fact}" for name, fact in self.facts.items()]
        for finding in self.findings:
            lines += [f"wrong: {finding.problem}", f"  fix: {finding.fix}"]
        if not self.findings:
            lines.append("nothing is wrong")
        return "\n".join([*lines, *self._model_lines()])

    def _model_lines(self) -> list[str]:
        if self.savings is None:
            return []
        s = self.savings
        lines = [f"{self.model}: {s.fused} of {s.norms} batch norms are fused"]
        lines += [f"  {name} is not fused: {reason}" for name, reason in s.reasons.items()]
        lines += [
            "derived (not measured) for the fused batch norms in a training step:",
            f"  memory traffic per image: {_mb(s.stock_bytes)} with torch's layers, "
            f"{_mb(s.fused_bytes)} fused",
            f"  kernel launches: {s.stock_launches} with torch's layers, {s.fused_launches} fused",
            f"channels_last: {_yes(s.channels_last)}; autocast or 16 bits: {_yes(s.half)}",
        ]
        for change in self.changes or []:
            saves = (
                "" if change.saves is None else f" (derived: saves {_mb(change.saves)} per image)"
            )
            lines.append(f"  {change.do}{saves}")
        return lines


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def diagnose(name: str | None = None, shape: tuple[int, ...] | None = None) -> Diagnosis:
    """Examines this machine and, if a name is given, a model.

    Args:
        name: name of the model. See `bnres.models.create_model`.
        shape: shape of the model's input, with at least two images.
    """

    findings = [finding for check in CHECKS if (finding := check()) is not None]
    savings = None
    if name is not None and shape is not None:
        try:
            savings = _derive(name, shape)
        except Exception as error:  # the findings about the machine are still reported
            problem = f"model {name!r} can't be examined: {describe(error)}"
            findings.append(Finding(problem, "use another model or another --input"))
    steps = None if savings is None else changes(savings)
    return Diagnosis(facts(), findings, name, savings, steps)


def _derive(name: str, shape: tuple[int, ...]) -> Savings:
    from bnres.models import create_model
    from bnres.models.trial import try_call

    model = create_model(name, in_channels=shape[1], fused=False)
    x = torch.zeros(shape)
    try_call(model, x)
    with usable_inductor_cache():
        return derive(model, x)
