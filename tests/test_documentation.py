"""Tests README and docs/: samples run, and links that don't start with https:// name a file."""

import ast
import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.torchvision_import import torchvision  # before samples import it

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SAMPLES = {
    f"{page.relative_to(ROOT)}-{i}": text
    for page in PAGES
    for i, text in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    )
}
# Packages that samples of docs/recipes.md import, and that the extra "test" does not install.
SEVERAL_LIBRARIES = ("ultralytics", "segmentation_models_pytorch", "lightning", "transformers")
pytestmark = pytest.mark.usefixtures("aten")


def imported(sample: str) -> set[str]:
    """Returns the names of the packages that a sample imports."""
    nodes = list(ast.walk(ast.parse(sample)))
    names = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_run(name, tmp_path, monkeypatch):
    for package in imported(SAMPLES[name]):
        if package in SEVERAL_LIBRARIES and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; it comes with bnres[recipes]")
        if package == "ultralytics" and not torchvision.extension._has_ops():
            pytest.skip("ultralytics needs torchvision's compiled operators")
    # transformers imports a package "kernels" if there is one. None hides our folder "kernels".
    monkeypatch.setitem(sys.modules, "kernels", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    torch.manual_seed(0)
    torch._dynamo.reset()
    exec(compile(SAMPLES[name], name, "exec"), {"__name__": "__main__"})


def test_the_pages_have_samples():
    assert len(SAMPLES) >= 20 and torchvision.__version__


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


def test_readme_fits_a_newcomers_patience():
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 120
