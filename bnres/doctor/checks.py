"""Checks of this machine. A check returns a problem and how to fix it, or None if all is well."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

import torch

import bnres

PROGRAM = "#include <Python.h>\nint nothing(void) { return 0; }\n"
LEAST_TRITON = (3, 6)
INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"


@dataclass(frozen=True)
class Finding:
    """A problem, and how to fix it."""

    problem: str
    fix: str


def check_gpu() -> Finding | None:
    """Checks that torch finds a GPU."""
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
    return Finding("torch finds no GPU", "check that nvidia-smi lists the GPU and its driver")


def check_triton() -> Finding | None:
    """Checks that triton can be imported, and that bnres supports its version."""
    try:
        import triton

        version = triton.__version__  # fails if Python has imported another folder named triton
    except Exception as error:  # a broken build may raise anything
        problem = "triton is missing"
        if not isinstance(error, ModuleNotFoundError):
            problem = f"triton can't be imported: {error}"
        return Finding(problem, "pip install 'triton>=3.6'")
    release = re.match(r"(\d+)\.(\d+)", version)
    if release and tuple(map(int, release.groups())) < LEAST_TRITON:
        return Finding(f"triton {version} is too old", "pip install 'triton>=3.6'")
    return None


def find_compiler() -> str | None:
    """Returns the path of the C compiler that triton uses, or None if there is none."""
    if "CC" in os.environ:
        return shutil.which(os.environ["CC"])
    return shutil.which("gcc") or shutil.which("clang")


def check_compiler() -> Finding | None:
    """Checks that a C compiler can build a Python extension, as triton does for its launchers."""
    fix = "install gcc and Python's headers (python3-dev), or set CC"
    compiler = find_compiler()
    if compiler is None:
        named = os.environ.get("CC")
        what = "there is no C compiler" if named is None else f"CC={named!r} is not a program"
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
    return Finding(f"{compiler} can't compile a Python extension: {reason}", fix)


def check_numpy() -> Finding | None:
    """Checks that triton's interpreter supports the installed numpy, if the interpreter is used."""
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
    """Returns the cache folders of triton and Inductor, by the environment variables that set them.

    If the user has no home folder, triton's cache is in a folder that is named "~".
    """
    home = Path(os.environ.get("TRITON_HOME") or os.path.expanduser("~"))
    return {
        "TRITON_CACHE_DIR": Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton/cache"),
        INDUCTOR_CACHE: Path(os.environ.get(INDUCTOR_CACHE) or _default_inductor_cache()),
    }


def _default_inductor_cache() -> str:
    # Only this file is run, because importing torch._inductor would create the cache folder or
    # raise an error.
    utils = Path(torch.__file__).parent / "_inductor/runtime/cache_dir_utils.py"
    folder: str = runpy.run_path(str(utils))["default_cache_dir"]()
    return folder


def check_cache(variable: str) -> Finding | None:
    """Checks that a cache folder is writable or can be created.

    ``variable`` is the environment variable that sets the folder.
    """
    folder = cache_folders()[variable]
    try:
        there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return Finding(
            f"the cache folder {folder} is not writable: {error.strerror}",
            f"set {variable} to a writable folder",
        )


@contextmanager
def usable_inductor_cache() -> Iterator[None]:
    """If Inductor's cache folder is not writable, uses a temporary folder inside the context.

    Dynamo can't be imported without a writable cache folder.
    """
    if check_cache(INDUCTOR_CACHE) is None:
        yield
        return
    asked = os.environ.get(INDUCTOR_CACHE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[INDUCTOR_CACHE] = folder
        try:
            yield
        finally:
            del os.environ[INDUCTOR_CACHE]
            if asked is not None:
                os.environ[INDUCTOR_CACHE] = asked


def check_namespace() -> Finding | None:
    """Checks that Python finds the package bnres, and not another folder with this name."""
    spec = PathFinder.find_spec("bnres", [os.getcwd(), *sys.path])
    if spec is None or spec.origin is not None:
        return None
    (folder, *_) = list(spec.submodule_search_locations or [])
    return Finding(
        f"in the current folder python imports the folder {folder} as an empty package bnres",
        "change to another folder, or install bnres again: pip install -e FOLDER",
    )


CHECKS: tuple[Callable[[], Finding | None], ...] = (
    check_gpu, check_triton, check_compiler, check_numpy, partial(check_cache, "TRITON_CACHE_DIR"),
    partial(check_cache, INDUCTOR_CACHE), check_namespace,
)  # fmt: skip
