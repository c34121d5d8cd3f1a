"""Tests that names in single back-ticks in docstrings exist."""

import ast
import builtins
import importlib
import pkgutil
import re
from functools import cache
from operator import attrgetter
from pathlib import Path
from types import ModuleType

import pytest

import benchmarks
import bnres
from benchmarks.torchvision_import import torchvision

NAME = re.compile(r"(?<!`)`([A-Za-z_][\w.]*)(?:\(\))?`(?!`)")
MODULES = [
    found.name
    for package in (bnres, benchmarks)
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not re.search(r"\.(__main__|bench_\w+|conftest)$", found.name)  # not scripts or pytest files
]


@cache
def symbols() -> set[str]:
    """Returns every name that a module of bnres or of the benchmarks defines or imports."""
    return {name for module in MODULES for name in vars(importlib.import_module(module))}


def imported(path: str) -> bool:
    """Returns whether a dotted path names a module, or an attribute inside a module."""
    parts = path.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
            attrgetter(".".join(parts[i:]))(found) if i < len(parts) else found
            return True
        except (ImportError, AttributeError):
            continue
    return False


def exists(name: str, module: ModuleType, classes: list[str]) -> bool:
    first, *rest = name.split(".")
    beside = module.__name__.rpartition(".")[0]
    if hasattr(builtins, name) or imported(name) or imported(f"{beside}.{name}"):
        return True
    for owner in (module, *(getattr(module, c, None) for c in classes)):
        try:
            attrgetter(name)(owner)
            return True
        except AttributeError:
            continue
    return first in symbols() and not rest


def docstrings(path: Path):
    """Yields each docstring of a file, with the names of the classes around it."""

    def visit(node, classes):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            inner = [*classes, node.name] if isinstance(node, ast.ClassDef) else classes
            if (text := ast.get_docstring(node)) is not None:
                yield text, inner
            for child in ast.iter_child_nodes(node):
                yield from visit(child, inner)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), [])


@pytest.mark.parametrize("name", MODULES)
def test_names_exist(name):
    module = importlib.import_module(name)
    missing = [
        found
        for text, classes in docstrings(Path(module.__file__))
        for found in NAME.findall(text)
        if not exists(found, module, classes)
    ]
    assert not missing and torchvision
