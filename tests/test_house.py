"""Tests of the code's structure: direction of imports, private names, and the cost of an import."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Modules of bnres. Each may import only itself and the modules that precede it in this list.
ROOMS = (
    "kernels",
    "backend",
    "activations",
    "routes",
    "recipes",
    "operations",
    "functional",
    "nn",
    "fusion",
    "tune",
    "models",
    "augment",
    "data",
    "train",
    "doctor",
    "cli",
)


def room_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources():
    for path in (ROOT / "bnres").rglob("*.py"):
        if "kernels" not in path.parts:
            yield path.relative_to(ROOT / "bnres").parts[0].removesuffix(".py"), path
    for path in (ROOT / "kernels").glob("*.py"):
        yield "kernels", path


@pytest.mark.parametrize(
    ("room", "path"), list(sources()), ids=lambda v: v.stem if isinstance(v, Path) else ""
)
def test_imports_point_down(room, path):
    for module in imports(path):
        top = module.split(".")[0]
        assert top not in ("tests", "benchmarks", "kernels"), module
        if room == "kernels" and top not in sys.stdlib_module_names:
            assert top in ("torch", "triton") or module.startswith("bnres.kernels"), module
        below = room_of(module)
        if top == "bnres" and room in ROOMS and below in ROOMS:
            assert ROOMS.index(below) <= ROOMS.index(room), f"{path}: {module}"


def test_every_package_is_installed():
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (packages,) = (
        ast.literal_eval(node.value)
        for node in setup.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "PACKAGES"
    )
    folders = {path.parent.name for path in (ROOT / "bnres").glob("*/__init__.py")}
    assert set(packages) == folders


INTERNALS = ("torch_internals.py", "triton_internals.py", "dynamo.py", "inductor.py")
# Names that may change with every release, although no part of them starts with an underscore.
PRIVATE = (
    "torch.fx.experimental", "torch.nn.modules.module", "torch.autograd.forward_ad",
    "knobs.runtime.launch", "runtime.driver",
)  # fmt: skip


@pytest.mark.parametrize("path", [p for _, p in sources()], ids=lambda p: p.stem)
def test_private_names_are_used_only_in_internals(path):
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    used = {*imports(path), *(ast.unparse(n) for n in tree if isinstance(n, ast.Attribute))}
    found = [
        name
        for name in used
        if re.match(r"(torch|triton)\b.*\._[a-zA-Z]", name) or any(p in name for p in PRIVATE)
    ]
    assert path.name in INTERNALS or not found, found


def run(code, **options):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, **options
    )


def test_bare_kernels_name_is_refused():
    result = run("import kernels")
    assert "import it as 'bnres.kernels'" in result.stderr


def test_importing_bnres_loads_few_modules():
    code = """
import sys, torch
before = set(sys.modules)
import bnres
new = set(sys.modules) - before
assert not torch.cuda.is_initialized()
others = {m.split('.')[0] for m in new} - sys.stdlib_module_names
assert others == {'bnres'}, others
unused = {'bnres.cli', 'bnres.train', 'bnres.data', 'bnres.kernels.launch'} & new
assert not unused, unused
assert 'bnres.nn' in new
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
