"""Tests of the wheel: its contents, and that it works outside the repository."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from email.parser import Parser
from pathlib import Path

import pytest

import bnres

ROOT = Path(__file__).parent.parent


def build(tree, out, what):
    code = f"import sys; from setuptools import build_meta; build_meta.build_{what}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, out], cwd=tree, check=True, capture_output=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds a wheel in a copy of the repository.

    A build leaves files in its folder, and later builds would include these files.
    """
    folder = tmp_path_factory.mktemp("packaging")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "runs")
    shutil.copytree(ROOT, folder / "bnres", symlinks=True, ignore=ignored)
    build(folder / "bnres", folder, "wheel")
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_contains_only_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        found = Counter(i.filename for i in archive.infolist() if ".dist-info/" not in i.filename)
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "bnres").rglob("*.py")}
    sources |= {f"bnres/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert found == Counter(dict.fromkeys([*sources, "bnres/py.typed"], 1))


def test_sdist_builds_the_same_wheel(wheel, tmp_path):
    copy = tmp_path / "bnres"
    shutil.copytree(wheel.parent / "bnres", copy, symlinks=True)
    build(copy, tmp_path, "sdist")
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        assert not [m.name for m in archive if m.issym() or "/tests" in m.name]
        archive.extractall(tmp_path, filter="data")
    build(tmp_path / f"bnres-{bnres.__version__}", tmp_path, "wheel")
    (again,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        folder = f"bnres-{bnres.__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
        license_text = archive.read(f"{folder}/licenses/LICENSE").decode()
        assert archive.read(f"{folder}/top_level.txt").decode() == "bnres\n"
    assert metadata["Version"] == bnres.__version__ == "0.1.0"
    assert metadata["License-Expression"] == "MIT"
    assert license_text == (ROOT / "LICENSE").read_text()
    assert metadata.get_payload() == (ROOT / "README.md").read_text()
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert changelog.startswith(f"# Changelog\n\n## {bnres.__version__}\n")


def test_wheel_works_outside_the_repository(wheel, tmp_path):
    site = tmp_path / "site"
    shutil.unpack_archive(wheel, site, "zip")
    result = subprocess.run(
        [sys.executable, ROOT / ".ci" / "smoke.py"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(site)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{site / 'bnres' / '__init__.py'}\n"


def test_editable_install_is_a_path_entry(wheel, tmp_path):
    """An editable install adds a path to ``sys.path``, not an import finder.

    With an import finder, ``import bnres`` in the parent folder of a clone would import the clone's
    folder as an empty namespace package.
    """
    tree = wheel.parent / "bnres"
    build(tree, tmp_path, "editable")
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        (entry,) = (n for n in archive.namelist() if ".dist-info/" not in n)
        assert entry.endswith(".pth") and archive.read(entry).decode().strip() == str(tree)
