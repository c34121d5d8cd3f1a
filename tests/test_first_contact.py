"""Tests of ``python -m benchmarks first-contact``, which tests and measures bnres on a new GPU.

The command runs a list of stages, each in its own process. If the time is too short for all stages,
the next call of the command continues.
"""

import json
import time

import pytest
from typer.main import get_command

import benchmarks.cli
import bnres.cli
from benchmarks import first_contact
from benchmarks.first_contact import Stage, stages

PRINT = ("-c", "print('hello')")
CONTINUES = ("-c", "import sys, time; time.sleep(0.3 if '--minutes' in sys.argv else 0)")


def run(folder, *chosen, minutes=10.0, again=()):
    lines = []
    left = first_contact.run(folder, minutes, lines.append, again, chosen)
    return left, lines


def statuses(folder):
    text = (folder / "stages.jsonl").read_text()
    return [(r["stage"], r["status"]) for r in map(json.loads, text.splitlines())]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(first_contact, "LEAST_SECONDS", 0.1)


def test_every_outcome_of_a_stage_is_recorded_once(tmp_path):
    chosen = (
        Stage("prints", PRINT, 1),
        Stage("fails", ("-c", "raise SystemExit(3)"), 1),
        Stage("hangs", ("-c", "import time; time.sleep(60)"), 0.01),
        Stage("absent", PRINT, 1, tool="no-such-program"),
        Stage("last", PRINT, 1),
    )
    start = time.monotonic()
    left, lines = run(tmp_path, *chosen)
    assert left == 0 and time.monotonic() - start < 30
    ends = [
        ("prints", "done"), ("fails", "failed"), ("hangs", "timed out"), ("absent", "skipped"),
        ("last", "done"),
    ]  # fmt: skip
    assert statuses(tmp_path) == ends
    assert lines[0].endswith("hello") and lines[3].endswith("(no-such-program is not installed)")
    log = (tmp_path / "log.txt").read_text()
    assert log.count("hello") >= 2 and log.index("===== fails") < log.index("===== hangs")
    # A second call runs no stage again.
    assert run(tmp_path, *chosen) == (0, [])
    assert statuses(tmp_path) == ends


def test_a_stage_that_continues_gets_its_time_in_several_calls(tmp_path):
    stage = Stage("long", CONTINUES, 0.02, continues=True)  # 1.2 s, for all calls together
    after = Stage("after", PRINT, 1)
    left, _ = run(tmp_path, stage, after, minutes=0.004)
    assert left == 2 and statuses(tmp_path) == [("long", "unfinished")]
    for _ in range(6):
        run(tmp_path, stage, after, minutes=0.004)
    assert statuses(tmp_path).count(("long", "unfinished")) >= 2
    assert run(tmp_path, stage, after)[0] == 0
    assert statuses(tmp_path)[-1] == ("after", "done")


def test_a_stage_that_does_not_fit_waits_for_the_next_call(tmp_path):
    first, long, short = Stage("first", PRINT, 1), Stage("long", PRINT, 5), Stage("short", PRINT, 1)
    left, _ = run(tmp_path, first, long, short, minutes=3)
    assert left == 1 and statuses(tmp_path) == [("first", "done"), ("short", "done")]
    # The first stage of a call is started even if its limit exceeds the call's time.
    assert run(tmp_path, first, long, short, minutes=3)[0] == 0
    assert statuses(tmp_path)[-1] == ("long", "done")


def test_an_interrupted_stage_still_prints(tmp_path):
    code = (
        "import time\ntry:\n    print('begun', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('its results', flush=True)"
    )
    _, lines = run(tmp_path, Stage("slow", ("-c", code), 0.03))
    assert statuses(tmp_path) == [("slow", "timed out")]
    assert lines[0].endswith("its results")


def test_a_stage_can_be_run_again(tmp_path):
    stage = Stage("prints", PRINT, 1)
    run(tmp_path, stage)
    assert run(tmp_path, stage, again=["prints"])[0] == 0
    assert statuses(tmp_path) == [("prints", "done"), ("prints", "again"), ("prints", "done")]
    with pytest.raises(ValueError, match="again must be one of prints, got 'x'"):
        run(tmp_path, stage, again=["x"])


def test_a_stage_that_ends_early_is_done(tmp_path):
    assert run(tmp_path, Stage("short", CONTINUES, 1, continues=True))[0] == 0
    assert statuses(tmp_path) == [("short", "done")]


def test_no_stage_is_started_without_time(tmp_path):
    left, lines = run(tmp_path, Stage("prints", PRINT, 1), minutes=0.0)
    assert left == 1 and lines == [] and not (tmp_path / "stages.jsonl").exists()


def test_the_stages_name_options_that_exist(tmp_path):
    apps = {"benchmarks": benchmarks.cli.app, "bnres.cli": bnres.cli.app}
    parsed = 0
    for stage in stages(tmp_path):
        if "-m" in stage.command and (module := stage.command[1]) in apps:
            name, *options = stage.command[2:]
            options += ["--minutes", "1"] if stage.continues else []
            command = get_command(apps[module]).commands[name]
            command.make_context(name, options)  # raises for an unknown option
            parsed += 1
    assert parsed == 7


def test_names_and_files_of_the_stages(tmp_path):
    found = stages(tmp_path)
    names = [stage.name for stage in found]
    assert names[:4] == ["environment", "smoke", "tests", "campaign"]
    assert len(set(names)) == len(names)
    # The stages write at most eight files, because copying the folder from a remote machine may be
    # limited to a few files.
    files = {part for s in found for part in s.command if part.startswith(f"{tmp_path}/")}
    assert len(files | {"log.txt", "stages.jsonl", "environment.json", "results.jsonl"}) <= 8
