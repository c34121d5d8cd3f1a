"""`bnres doctor`: what bnres finds on this machine, what is wrong, and how to fix it."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

import torch

import bnres
from bnres.savings import Savings, derive

ROUTES = {
    "triton": "GPU tensors take Triton kernels, CPU tensors take ATen",
    "triton-interpreter": "all tensors take Triton's interpreter, which is slow",
    "aten": "CPU tensors take ATen, the kernels don't run",
}
PROGRAM = "#include <Python.h>\nint nothing(void) { return 0; }\n"
LEAST_TRITON = (3, 6)


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, and how to fix it."""

    problem: str
    fix: str


def check_gpu() -> Finding | None:
    """That torch finds a GPU."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return Finding(
            f"torch {torch.__version__} is built for the CPU only",
            "install a build of torch for your GPU",
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return Finding(f"CUDA_VISIBLE_DEVICES={hidden!r} hides the GPUs", "unset it")
    return Finding("torch finds no GPU", "see whether nvidia-smi lists one, and its driver")


def check_triton() -> Finding | None:
    """That triton can be imported, and is no older than bnres supports."""
    try:
        import triton
    except Exception as error:  # a broken build may raise anything
        problem = "triton is missing"
        if not isinstance(error, ModuleNotFoundError):
            problem = f"triton can't be imported: {error}"
        return Finding(problem, "pip install 'triton>=3.6'")
    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if release < LEAST_TRITON:
        return Finding(f"triton {triton.__version__} is too old", "pip install 'triton>=3.6'")
    return None


def find_compiler() -> str | None:
    """The C compiler that triton takes, or None."""
    if "CC" in os.environ:
        return shutil.which(os.environ["CC"])
    return shutil.which("gcc") or shutil.which("clang")


def check_compiler() -> Finding | None:
    """That a C compiler makes an extension of Python: triton launches kernels by one."""
    fix = "install gcc and Python's headers (python3-dev), or set CC"
    compiler = find_compiler()
    if compiler is None:
        named = os.environ.get("CC")
        what = "there is no C compiler" if named is None else f"CC={named!r} is no program"
        return Finding(f"{what}, which triton needs to launch kernels", fix)
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text(PROGRAM)
        include = f"-I{sysconfig.get_paths(scheme=scheme)['include']}"
        command = [compiler, str(source), "-shared", "-fPIC", "-o", f"{folder}/probe.so", include]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return Finding(f"{compiler} can't be run: {error.strerror}", fix)
    if result.returncode == 0:
        return None
    said = [line for line in result.stderr.splitlines() if "error" in line]
    reason = said[0] if said else f"exit code {result.returncode}"
    return Finding(f"{compiler} can't compile an extension of Python: {reason}", fix)


def check_numpy() -> Finding | None:
    """That triton's interpreter can run with the numpy here, where it is to run."""
    if bnres.backend() != "triton-interpreter" or check_triton() is not None:
        return None
    import triton

    from bnres.kernels.interpreter import check_versions

    try:
        check_versions(triton.__version__, metadata.version("numpy"))
    except metadata.PackageNotFoundError:
        return Finding("numpy is missing, which triton's interpreter needs", "pip install numpy")
    except ImportError as error:
        problem, _, needed = str(error).partition(": it needs ")
        return Finding(problem, f"install {needed}")
    return None


def cache_folders() -> dict[str, Path]:
    """Where triton and torch's Inductor keep what they compile."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    return {
        "TRITON_CACHE_DIR": Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton/cache"),
        "TORCHINDUCTOR_CACHE_DIR": Path(
            os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()
        ),
    }


def check_cache(variable: str) -> Finding | None:
    """That something can be written to a cache folder, or that it can be made.

    Args:
        variable: of the environment, which names the folder; a key of `cache_folders`.
    """
    folder = cache_folders()[variable]
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return Finding(
            f"the cache folder {folder} is not writable: {error.strerror}",
            f"set {variable} to a folder that is",
        )


def check_namespace() -> Finding | None:
    """That no folder named bnres is imported in place of bnres by a Python in this folder."""
    spec = PathFinder.find_spec("bnres", [os.getcwd(), *sys.path])
    if spec is None or spec.origin is not None:
        return None
    (folder, *_) = list(spec.submodule_search_locations or [])
    return Finding(
        f"in this folder python imports the folder {folder} as an empty package bnres",
        "go to another folder, or install bnres again: pip install -e FOLDER",
    )


def _triton_cache() -> Finding | None:
    return check_cache("TRITON_CACHE_DIR")


def _inductor_cache() -> Finding | None:
    return check_cache("TORCHINDUCTOR_CACHE_DIR")


CHECKS: tuple[Callable[[], Finding | None], ...] = (
    check_gpu, check_triton, check_compiler, check_numpy, _triton_cache, _inductor_cache,
    check_namespace,
)  # fmt: skip


def facts() -> dict[str, str]:
    """What is on this machine, by name."""
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
    """Something to change in a training script.

    Attributes:
        do: what.
        saves: bytes for each image of a training step, derived; None where that is not known.
    """

    do: str
    saves: int | None


def changes(savings: Savings) -> list[Change]:
    """What to change, what saves most first."""
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
            Change("convert with model.to(memory_format=torch.channels_last), the input too", None)
        )
    known = [change for change in found if change.saves]
    unknown = [change for change in found if change.saves is None]
    return sorted(known, key=lambda change: -(change.saves or 0)) + unknown


@dataclass(frozen=True)
class Diagnosis:
    """What `bnres doctor` prints."""

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
        lines += [f"  {name} is not: {reason}" for name, reason in s.reasons.items()]
        lines += [
            "derived for a training step of the fused batch norms, not measured:",
            f"  {_mb(s.stock_bytes)} an image with torch's own layers, {_mb(s.fused_bytes)} fused",
            f"  {s.stock_launches} launches with torch's own layers, {s.fused_launches} fused",
            f"channels_last: {_yes(s.channels_last)}; autocast or 16 bits: {_yes(s.half)}",
        ]
        for change in self.changes or []:
            saves = "" if change.saves is None else f" (derived: {_mb(change.saves)} an image less)"
            lines.append(f"  {change.do}{saves}")
        return lines


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def diagnose(name: str | None = None) -> Diagnosis:
    """Examines this machine and, with a name, that model.

    Raises:
        ValueError: for a name that is not in `bnres.models.MODELS`.
    """
    from bnres.models import DEFAULT_INPUT_SHAPE, INPUT_SHAPES, create_model

    if name is None:
        savings = None
    else:
        _, *shape = INPUT_SHAPES.get(name, DEFAULT_INPUT_SHAPE)
        model = create_model(name, in_channels=shape[0], fused=False)
        savings = derive(model, torch.zeros(2, *shape))
    findings = [finding for check in CHECKS if (finding := check()) is not None]
    steps = None if savings is None else changes(savings)
    return Diagnosis(facts(), findings, name, savings, steps)
