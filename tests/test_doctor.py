"""Tests of ``bnres doctor``: its findings, and that its savings equal the benchmarks' counts."""

import json
import os
import shutil
import stat
import subprocess
import sys
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
from torch import nn
from typer.testing import CliRunner

from benchmarks import byte_model
from bnres import cli, use_backend
from bnres.doctor import checks, diagnosis, savings
from bnres.doctor.checks import Finding
from bnres.doctor.diagnosis import Change
from bnres.models import create_model
from tests.disks import read_only

ROOT = Path(__file__).parent.parent
HEADERS = "install gcc and Python's headers (python3-dev), or set CC"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@no_gpu
def test_no_gpu(monkeypatch):
    if torch.version.cuda is None:
        assert checks.check_gpu() == Finding(
            f"torch {torch.__version__} is built for the CPU only",
            "install a build of torch for your GPU",
        )
        monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert checks.check_gpu() == Finding(
        "torch finds no GPU", "check that nvidia-smi lists the GPU and its driver"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert checks.check_gpu() == Finding("CUDA_VISIBLE_DEVICES='-1' hides the GPUs", "unset it")


def test_a_gpu_is_no_finding(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert checks.check_gpu() is None


def test_triton(monkeypatch):
    assert checks.check_triton() is None
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    fix = "pip install 'triton>=3.6'"
    assert checks.check_triton() == Finding("triton 3.5.1 is too old", fix)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert checks.check_triton() == Finding("triton is missing", fix)


def test_triton_that_is_broken(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('libtriton.so is damaged')")
    code = "from bnres.doctor import checks; print(checks.check_triton().problem)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert found.stdout == "triton can't be imported: libtriton.so is damaged\n", found.stderr


def test_a_folder_named_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    assert checks.check_triton() == Finding(
        "triton can't be imported: module 'triton' has no attribute '__version__'",
        "pip install 'triton>=3.6'",
    )


class TestCompiler:
    @pytest.fixture(autouse=True)
    def no_cc(self, monkeypatch):
        monkeypatch.delenv("CC", raising=False)

    def test_a_working_compiler(self):
        assert checks.check_compiler() is None

    def test_no_compiler(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        assert checks.check_compiler() == Finding(
            "there is no C compiler, which triton needs to launch kernels", HEADERS
        )
        assert diagnosis.facts()["C compiler"] == "none"

    def test_cc_that_is_missing(self, monkeypatch):
        monkeypatch.setenv("CC", "no-such-cc")
        assert checks.check_compiler() == Finding(
            "CC='no-such-cc' is not a program, which triton needs to launch kernels", HEADERS
        )

    def test_cc_that_fails(self, monkeypatch):
        monkeypatch.setenv("CC", "false")
        assert checks.check_compiler() == Finding(
            f"{shutil.which('false')} can't compile a Python extension: exit code 1", HEADERS
        )

    def test_cc_that_is_damaged(self, monkeypatch, tmp_path):
        program = tmp_path / "cc"
        program.write_bytes(b"\x7fELF")
        program.chmod(0o755)
        monkeypatch.setenv("CC", str(program))
        assert checks.check_compiler() == Finding(
            f"{program} can't be run: Exec format error", HEADERS
        )

    def test_no_headers(self, monkeypatch, tmp_path):
        monkeypatch.setattr(
            checks.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)}
        )
        found = checks.check_compiler()
        assert "can't compile a Python extension" in found.problem
        assert "Python.h: No such file or directory" in found.problem

    def test_clang_is_used_without_gcc(self, monkeypatch, tmp_path):
        program = tmp_path / "clang"
        program.write_text("#!/bin/sh\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert checks.find_compiler() == str(program)


def test_numpy_too_new_for_the_interpreter(monkeypatch):
    with use_backend("triton-interpreter"):
        versions = {"numpy": "2.3.5"}
        monkeypatch.setattr(triton, "__version__", "3.6.0")
        monkeypatch.setattr(metadata, "version", versions.__getitem__)
        assert checks.check_numpy() is None
        versions["numpy"] = "2.4.6"
        assert checks.check_numpy() == Finding(
            "triton 3.6.0's interpreter can't run with numpy 2.4.6",
            "install numpy < 2.4, or triton >= 3.7",
        )
    with use_backend("aten"):
        assert checks.check_numpy() is None


def test_numpy_is_missing(monkeypatch):
    def version(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", version)
    with use_backend("triton-interpreter"):
        assert checks.check_numpy() == Finding(
            "numpy is missing, which triton's interpreter needs", "pip install numpy"
        )


@pytest.mark.parametrize("variable", ["TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"])
def test_cache_folder(monkeypatch, tmp_path, variable):
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv(variable, str(folder / "deeper" / "still"))
    assert checks.check_cache(variable) is None
    assert list(folder.iterdir()) == []
    with read_only(folder):
        found = checks.check_cache(variable)
    assert found.problem.startswith(f"the cache folder {folder}/deeper/still is not writable: ")
    assert found.fix == f"set {variable} to a writable folder"
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    assert checks.check_cache(variable).problem.endswith("not writable: Not a directory")


@contextmanager
def another_user():
    """Inside the context, root becomes another user, because permissions do not restrict root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("variable", ["TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"])
def test_cache_folder_in_a_folder_without_permissions(monkeypatch, tmp_path, variable):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o000)
    monkeypatch.setenv(variable, str(closed / "cache"))
    with another_user():
        assert checks.check_cache(variable) == Finding(
            f"the cache folder {closed}/cache is not writable: Permission denied",
            f"set {variable} to a writable folder",
        )


def test_a_user_without_a_home(monkeypatch):
    """HOME is not set, and the user id is not in /etc/passwd, as in some containers."""
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("TRITON_HOME", raising=False)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert checks.cache_folders()["TRITON_CACHE_DIR"] == Path("~/.triton/cache")


def test_an_inductor_cache_that_can_not_be_created(tmp_path):
    """Runs in a new process, because importing Dynamo creates the cache folder."""
    folder = tmp_path / "file"
    folder.write_text("")
    result = subprocess.run(
        [sys.executable, "-m", "bnres.cli", "doctor", "lenet-seed", "--json"],
        cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder)},
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    found = json.loads(result.stdout)
    assert {
        "problem": f"the cache folder {folder} is not writable: Not a directory",
        "fix": "set TORCHINDUCTOR_CACHE_DIR to a writable folder",
    } in found["findings"]
    assert (found["savings"]["norms"], found["savings"]["fused"]) == (4, 4)


def test_cache_folders_are_those_of_triton_and_inductor(monkeypatch, tmp_path):
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for variable in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(variable, "")  # so that monkeypatch undoes what cache_dir sets
        monkeypatch.delenv(variable)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    found = checks.cache_folders()
    assert found["TRITON_CACHE_DIR"] == Path(triton.knobs.cache.dir) == tmp_path / ".triton/cache"
    assert found["TORCHINDUCTOR_CACHE_DIR"] == Path(cache_dir())


def test_namespace_package(monkeypatch, tmp_path):
    (tmp_path / "bnres").mkdir()
    monkeypatch.chdir(tmp_path)
    # Python prefers a package with an __init__.py to a folder without one, even if the folder is
    # earlier in sys.path.
    assert checks.check_namespace() is None
    finder_only = [p for p in sys.path if not Path(p, "bnres").is_dir()]
    monkeypatch.setattr(sys, "path", finder_only)
    assert checks.check_namespace() == Finding(
        f"in the current folder python imports the folder {tmp_path / 'bnres'} as an empty package "
        "bnres",
        "change to another folder, or install bnres again: pip install -e FOLDER",
    )


@pytest.mark.parametrize(
    ("pattern", "operation"),
    [
        ("bn", "bn"),
        ("conv-bn-act", "bn_relu"),
        ("bn-add-act", "bn_add_relu"),
        ("conv-bn+bn-add-act", "dual_bn_add_relu"),
        ("conv-bn-act-pool", "bn_relu_pool"),
    ],
)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_bytes_equal_those_of_the_benchmarks(pattern, operation, itemsize):
    directions = ("forward", "backward")
    expected = sum(byte_model.passes(operation, d, itemsize) for d in directions)
    assert savings.fused_passes(pattern, itemsize) == expected


@pytest.mark.parametrize(
    ("pattern", "passes", "stock", "fused"),
    [
        ("bn", 8, 6, 6),
        ("bn-act", 13, 8, 6),
        ("conv-bn-add-act", 16, 9, 6),
        ("bn+bn-add-act", 24, 15, 8),
        ("bn-act-pool", 13 + 2 * (1.25 + 1), 10, 6),
    ],
)
def test_stock_layers(pattern, passes, stock, fused):
    assert savings.stock_passes(pattern, 2) == passes
    assert savings.stock_launches(pattern) == stock
    assert savings.fused_launches(pattern) == fused


def test_launches_equal_those_that_the_audit_counts():
    budget = json.loads((ROOT / "benchmarks/audit/budget.json").read_text())
    found = savings.derive(create_model("resnet18", fused=False), torch.zeros(2, 3, 32, 32))
    assert found.fused_launches == budget["launches"]["fused, Triton"]
    assert (found.norms, found.fused, found.reasons) == (20, 20, {})


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8),
    )  # fmt: skip


def test_bytes_are_per_image():
    found = savings.derive(net(), torch.zeros(2, 3, 10, 10))
    stock = 4 * (13 * 400 + 8 * 800)
    assert found == savings.Savings(
        norms=2, fused=2, reasons={}, stock_bytes=stock, fused_bytes=4 * 8 * 1200,
        half_bytes=2 * 8 * 1200, stock_launches=14, fused_launches=12, channels_last=False,
        half=False,
    )  # fmt: skip
    assert diagnosis.changes(found) == [
        Change("compute in bf16: with torch.autocast('cuda', torch.bfloat16):", 19200),
        Change("fuse: model = bnres.fuse(model)", 8000),
        Change("convert model and input with .to(memory_format=torch.channels_last)", None),
    ]


def test_bf16_and_channels_last_are_not_suggested_if_already_used():
    model = net().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        found = savings.derive(model, torch.zeros(2, 3, 10, 10))
    assert found.channels_last and found.half and found.fused_bytes == found.half_bytes
    assert [c.do for c in diagnosis.changes(found)] == ["fuse: model = bnres.fuse(model)"]


def test_a_norm_that_is_not_fused_has_its_reason():
    model = net()
    model[1].unused = nn.BatchNorm2d(4)
    found = savings.derive(model, torch.zeros(2, 3, 10, 10))
    assert (found.norms, found.fused) == (3, 2)
    assert found.reasons == {"1.unused": "torch.compile captured no call of it"}
    text = str(diagnosis.Diagnosis({}, [], "a net", found, []))
    assert "a net: 2 of 3 batch norms are fused\n" in text
    assert "\n  1.unused is not fused: torch.compile captured no call of it\n" in text


runner = CliRunner()


@no_gpu
def test_command(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with use_backend("aten"):
        result = runner.invoke(cli.app, ["doctor", "lenet-seed"])
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert lines[0] == "GPU:        none"
    assert "backend:    aten" in lines
    assert "route:      ATen for CPU tensors; the kernels don't run" in lines
    assert f"wrong: torch {torch.__version__} is built for the CPU only" in lines
    assert "  fix: install a build of torch for your GPU" in lines
    assert "lenet-seed: 4 of 4 batch norms are fused" in lines
    assert lines[-1] == "  convert model and input with .to(memory_format=torch.channels_last)"


@no_gpu
def test_json_holds_the_same_facts():
    result = runner.invoke(cli.app, ["doctor", "lenet-seed", "--json"])
    assert result.exit_code == 1
    found = json.loads(result.output)
    assert found["facts"]["torch"] == torch.__version__
    assert found["findings"][0]["problem"] == checks.check_gpu().problem
    assert found["savings"]["fused"] == 4 and found["model"] == "lenet-seed"
    assert {c["do"].split(":")[0] for c in found["changes"][:2]} == {"fuse", "compute in bf16"}


def test_nothing_is_wrong(monkeypatch):
    monkeypatch.setattr(diagnosis, "CHECKS", (lambda: None,))
    result = runner.invoke(cli.app, ["doctor"])
    assert result.exit_code == 0 and result.output.splitlines()[-1] == "nothing is wrong"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["resnet19"], "got 'resnet19'"),
        (["lenet-seed", "--input", "2x1x40x40"], "does not accept inputs of 2x1x40x40: mat1"),
        (["lenet-seed", "--input", "1x1x28x28"], "Expected more than 1 value per channel"),
    ],
)
def test_a_model_that_fails_is_a_finding(monkeypatch, arguments, problem):
    monkeypatch.setattr(diagnosis, "CHECKS", (lambda: None,))
    with use_backend("aten"):
        result = runner.invoke(cli.app, ["doctor", *arguments])
    assert result.exit_code == 1
    assert result.output.startswith("GPU: ")
    assert f"wrong: model {arguments[0]!r} can't be examined: " in result.output
    assert problem in result.output


def test_input_without_a_model():
    result = runner.invoke(cli.app, ["doctor", "--input", "2x3x8x8"])
    assert result.exit_code == 2
    assert result.stderr == "bnres: input can be given only with a model\n"


def test_a_model_that_makes_tensors_in_its_forward():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(x) + torch.ones(1)

    assert savings.derive(Net(), torch.zeros(2, 3, 4, 4)).fused == 1
