"""Tests of ``bnres tune``: its measurements, its table, and the routes read from the table."""

import json
from dataclasses import replace

import pytest
import torch
from triton.runtime.errors import OutOfResources
from typer.testing import CliRunner

from bnres import routes
from bnres.cli import app
from bnres.kernels.conv_config import ConvShape, conv_config, search_space
from bnres.models.blocks import BasicBlock
from bnres.models.layers import stock_norm_act
from bnres.routes import ConvCall
from bnres.tune import conv_calls, tune
from tests.device import DEVICE

WINDOW = ConvShape(1, 1, 1, 1, 0, 0, 1, 1)
SMALL = ConvCall("float16", 1, 8, 4, 4, 64, WINDOW, False)
LARGE = replace(SMALL, batch=2)


class Time:
    """A clock that advances by one second for each call that its timer measures."""

    def __init__(self, milliseconds=lambda count: 1.0):
        self.seconds, self.milliseconds = 0, milliseconds

    def clock(self):
        return float(self.seconds)

    def timer(self, call):
        call()
        self.seconds += 1
        return self.milliseconds(self.seconds)


def run(calls, path, time, minutes=60.0, say=lambda line: None):
    tune(
        calls, path, {"gpu": "test"}, torch.device(DEVICE), time.timer, minutes=minutes,
        clock=time.clock, say=say,
    )  # fmt: skip
    return routes.read_table(path)


def configs_of(call):
    return search_space(call.batch * call.height * call.width, call.channels, call.out_channels, 2)


def test_calls_of_a_model():
    block = BasicBlock(8, 16, 2, stock_norm_act)
    calls = conv_calls(block, (1, 8, 4, 4), torch.float32)
    assert len(calls) == 6  # three convolutions, each with and without residual


def test_search_starts_with_the_heuristics_configuration_and_its_neighbours():
    arguments = (10**6, 512, 256, 2)
    names = [config.name for config in search_space(*arguments)]
    assert names[0] == conv_config(*arguments).name == "128x128x64 warps 8 stages 3"
    assert set(names[1:4]) == {
        "64x128x64 warps 4 stages 3",
        "128x64x64 warps 4 stages 3",
        "128x128x64 warps 8 stages 4",
    }
    assert names[-1] == "64x64x64 warps 4 stages 4"  # two sizes halved, one stage added


def test_the_faster_route_is_used(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "routes.json"
    assert routes.load_table(path) == {}
    # Each measurement is slower than the one before. torch is measured first, so it is fastest.
    (row,) = run([SMALL], path, Time(lambda count: float(count)))
    assert (row.call, row.config, row.torch_ms, row.kernel_ms) == (
        SMALL,
        configs_of(SMALL)[0],
        1,
        2,
    )
    assert routes.load_table(path) == {}
    # Each measurement is faster than the one before, so the last configuration is fastest. The new
    # row replaces the earlier row.
    run([SMALL], path, Time(lambda count: 100.0 - count))
    assert routes.load_table(path) == {SMALL: configs_of(SMALL)[-1]}
    run([LARGE], path, Time())
    assert [row.call for row in routes.read_table(path)] == [SMALL, LARGE]
    monkeypatch.setenv("BNRES_ROUTES", str(path))
    assert routes.table_path("gpu") == path


def test_a_configuration_that_fails_is_recorded_and_skipped(tmp_path, monkeypatch):
    from bnres import tune as module

    first, second, third, *others = configs_of(SMALL)
    by_kernel = module._by_kernel

    def faulty(operands, call, config):
        if config == second:
            raise OutOfResources(300_000, 200_000, "shared memory")
        y = by_kernel(operands, call, config)
        return y * 2 if config == first else y * float("nan") if config == third else y

    monkeypatch.setattr(module, "_by_kernel", faulty)
    (row,) = run([SMALL], tmp_path / "routes.json", Time())
    assert row.config == others[0]
    assert list(row.failed) == [first.name, second.name, third.name]
    wrong, too_large, not_a_number = row.failed.values()
    assert "from torch's convolution" in wrong
    assert "OutOfResources: out of resource: shared memory, Required: 300000" in too_large
    assert "the output differs by nan from" in not_a_number

    def broken(operands, call, config):
        raise RuntimeError("PassManager::run failed\nand more")

    monkeypatch.setattr(module, "_by_kernel", broken)
    lines = []
    (row,) = run([SMALL], tmp_path / "routes.json", Time(), say=lines.append)
    assert row.config is None and row.kernel_ms is None
    assert set(row.failed.values()) == {"RuntimeError: PassManager::run failed"}
    assert routes.load_table(tmp_path / "routes.json") == {}
    assert "kernel failed, torch 1.000 ms" in lines[0]
    assert f"  failed: {first.name}: RuntimeError: PassManager::run failed" in lines


def test_the_longest_calls_are_measured_first(tmp_path):
    """Each row is saved as soon as its call is measured. Unmeasured configurations are printed."""
    path = tmp_path / "routes.json"
    count = len(configs_of(LARGE))
    lines, saved = [], []

    def say(line):
        lines.append(line)
        saved.append(len(routes.read_table(path)))

    # There is time for torch and all configurations of the longest call, then for torch and two
    # configurations of the next call.
    seconds = 1 + count + 3
    calls = [replace(SMALL, height=2), SMALL, LARGE]
    rows = run(calls, path, Time(), minutes=seconds / 60, say=say)
    assert [row.call for row in rows] == [LARGE, SMALL]
    assert rows[0].left_out == []
    assert rows[1].left_out == [config.name for config in configs_of(SMALL)[2:]]
    assert lines[0].startswith(f"1/3 {LARGE.key}: kernel 1.000 ms") and saved[0] == 1
    assert lines[1].startswith(f"2/3 {SMALL.key}: kernel 1.000 ms") and saved[1] == 2
    assert lines[2] == f"  left out: {configs_of(SMALL)[2].name}"
    assert lines[-1] == f"left out: {calls[0].key}"


def test_of_calls_with_equal_flops_the_one_with_more_bytes_is_first(tmp_path):
    residual = replace(SMALL, has_residual=True)
    rows = run([SMALL, residual], tmp_path / "routes.json", Time())
    assert [row.call for row in rows] == [residual, SMALL]


@pytest.mark.parametrize("kind", ["empty", "unknown field", "no JSON"])
def test_another_file_is_refused(kind, tmp_path):
    path = tmp_path / "routes.json"
    run([SMALL], path, Time())
    table = json.loads(path.read_text())
    table["routes"][0]["call"]["removed_field"] = False
    path.write_text({"empty": "{}", "unknown field": json.dumps(table), "no JSON": "x"}[kind])
    routes.load_table.cache_clear()
    message = r"not a table of routes of this version: .*; delete it, then run bnres tune"
    with pytest.raises(ValueError, match=message):
        routes.load_table(path)
    with pytest.raises(ValueError, match=message):
        run([SMALL], path, Time())


def test_command(tmp_path):
    for arguments, message in (
        (["--minutes", "0"], "minutes must be above 0, got 0"),
        (["--out", str(tmp_path)], "out must be a file, got the folder"),
        (["--dtype", "fp8"], "dtype must be one of fp32, bf16, fp16, got 'fp8'"),
    ):
        result = CliRunner().invoke(app, ["tune", *arguments])
        assert result.exit_code == 2 and message in result.output
    if DEVICE == "cpu":
        result = CliRunner().invoke(app, ["tune", "--minutes", "1"])
        assert result.exit_code == 2 and "tune needs a GPU" in result.output
