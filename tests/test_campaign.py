"""Tests of campaigns: outcomes of cases, resumed runs, and which cases fit in the time."""

import os
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import busy, campaign, cases, cost, environment, measure
from benchmarks.audit import host
from benchmarks.child import Child, ChildFailed
from benchmarks.store import ResultStore, load
from tests import standins
from tests.test_benchmarks import ABOUT, CASE, CEILINGS, CPU, SITE


def of(*deeds):
    """Returns one case for each of ``deeds``. Each case has a site of its own.

    ``deeds`` are keys of `tests.standins.DEEDS`. They select what happens when a case is measured.
    """
    return [
        replace(CASE, site=replace(SITE, name=f"{place}"), batch=deed, smoke=False)
        for place, deed in enumerate(deeds)
    ]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class TestCampaign:
    def run(self, folder, chosen, child, seconds=60.0, limit_of=lambda case: 2.0, device=CPU):
        store = ResultStore(folder, ABOUT)
        deadline, measured = time.monotonic() + seconds, "tests.standins:measure"
        return campaign.run(
            store, chosen, deadline, device, lambda line: None, child, measured, limit_of
        )

    @pytest.mark.slow
    def test_every_outcome_of_a_child_is_recorded(self, tmp_path):
        chosen = of(
            standins.FINE, standins.RAISES, standins.SKIPPED, standins.REFUSED, standins.FINE,
            standins.HANGS, standins.ABORTS, standins.EXITS, standins.OUT_OF_MEMORY,
            standins.CAPTURES, standins.FINE,
        )  # fmt: skip
        with Child() as child:
            assert self.run(tmp_path, chosen, child) == len(chosen)
            last = child.pid
        assert not alive(last)
        records = load(tmp_path)[1]
        assert [(r["status"], r.get("reason", "").splitlines()[:1]) for r in records] == [
            ("measured", []),
            ("failed", ["RuntimeError: broken"]),
            ("skipped", ["not here"]),
            ("refused", ["wrong"]),
            ("measured", []),
            ("failed", ["timed out after 2 s"]),
            ("failed", ["killed by signal SIGABRT"]),
            ("failed", ["exited with code 3"]),
            ("failed", ["OutOfMemoryError: no memory"]),
            ("failed", ["RuntimeError: operation not permitted when stream is capturing"]),
            ("measured", []),
        ]
        assert "in hang" in records[5]["reason"] and "Fatal Python error" in records[6]["reason"]
        assert records[0]["copy"] == CEILINGS["copy"]
        # An error that does not concern the GPU does not end the child process.
        assert records[0]["pid"] == records[4]["pid"] != records[-1]["pid"] == last
        assert not alive(records[0]["pid"])
        assert records[5]["wall_seconds"] > 2 and records[0]["wall_seconds"] < 60

    def test_resumed_run_repeats_nothing(self, tmp_path):
        chosen = of(*[standins.FINE] * 4)
        interrupted = []

        def limit_of(case):
            interrupted.append(case)
            if len(interrupted) == 3:
                raise KeyboardInterrupt
            return 2.0

        with pytest.raises(KeyboardInterrupt), Child() as child:
            self.run(tmp_path, chosen, child, limit_of=limit_of)
        assert child.pid is None
        first = load(tmp_path)[1]
        assert [r["id"] for r in first] == [case.id for case in chosen[:2]]
        assert not alive(first[0]["pid"])
        path = tmp_path / "results.jsonl"
        path.write_text(path.read_text() + '{"id": "cut o')
        with Child() as child:
            assert self.run(tmp_path, chosen[::-1], child) == 2
            assert self.run(tmp_path, chosen, child) == 0
        records = load(tmp_path)[1]
        assert records[:2] == first
        assert [r["id"] for r in records[2:]] == [case.id for case in chosen[:1:-1]]

    def test_only_cases_that_fit_are_measured(self, tmp_path, monkeypatch):
        slow = replace(of(standins.FINE, standins.FINE)[1], provider="compile")
        with Child() as child:
            assert self.run(tmp_path, of(standins.FINE), child, seconds=0) == 0
            assert child.pid is None
            assert self.run(tmp_path, [slow, *of(standins.FINE)], child, seconds=5) == 1
            # A case that the campaign's deadline interrupts is not recorded, so a later run repeats
            # the case.
            monkeypatch.setattr(campaign, "GRACE", 0.0)
            hung = of(standins.FINE, standins.HANGS)
            assert self.run(tmp_path, hung, child, seconds=1.5) == 0
        assert [r["id"] for r in load(tmp_path)[1]] == [hung[0].id]

    def test_a_group_is_started_only_if_all_of_it_fits(self, tmp_path):
        first, second, third = of(*[standins.FINE] * 3)
        # The estimates, doubled by `cost.MARGIN`, are 19 s for the large group, 4 s for the small.
        large = [replace(first, provider=name) for name in ("eager", "bnres", "compile")]
        small = [second, replace(second, provider="bnres-recompute")]
        with Child() as child:
            # Starts the child process now, so that no case's time includes the start.
            child.call("time:monotonic", limit=60)
            assert self.run(tmp_path, [*large, *small], child, seconds=18) == 2
            assert [r["id"] for r in load(tmp_path)[1]] == [case.id for case in small]
            assert self.run(tmp_path, [*large, third], child, seconds=30) == 4

    def test_a_late_group_continues_with_the_cases_that_fit(self):
        first, second = of(standins.FINE, standins.FINE)
        names = ("eager", "bnres", "compile", "bnres-recompute")
        group = [replace(first, provider=name) for name in names]
        costs, found = cost.Costs([]), []
        for case in costs.fitting([group, [second]], lambda: 25.0 - 10 * len(found)):
            found.append(case.provider)
        # 25 s are left at first, and each case takes 10 s. The group starts, because its estimate,
        # doubled by `cost.MARGIN`, is 21 s. After two cases, 5 s are left. This is too little for
        # compile, which is estimated at 6 s, but enough for bnres-recompute, estimated at 1 s.
        assert found == ["eager", "bnres", "bnres-recompute"]

    def test_the_margin_is_only_for_unknown_kinds(self):
        (eager,) = of(standins.FINE)
        compiled = replace(eager, provider="compile")
        assert cost.Costs([]).most_seconds([eager, compiled]) == 2 * (1.0 + 6.0)
        seen = measure.fields_of(eager) | {"status": "measured", "wall_seconds": 3.0}
        assert cost.Costs([seen]).most_seconds([eager, compiled]) == 3.0 + 2 * 6.0

    def test_the_parent_does_not_open_the_gpu(self, tmp_path, monkeypatch):
        def opened():
            pytest.fail("the parent has opened the GPU")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "_lazy_init", opened)
        device, chosen = environment.default_device(), cases.default_cases()
        assert device.type == "cuda" and chosen == cases.all_cases()
        chosen = [replace(chosen[0], batch=standins.FINE), *of(standins.RAISES, standins.FINE)]
        with Child() as child:
            assert self.run(tmp_path, chosen, child, device=device) == 3

    def test_idle_share_is_what_a_graph_saves(self, tmp_path):
        store = ResultStore(tmp_path, ABOUT)
        loop = cases.ModelCase(
            "step", "resnet18", 224, 32, "eager", "bf16", "channels_last", "eager"
        )
        timed = {"status": "measured", "median": 4e-3, "method": "loop"}
        assert campaign.idle_share(loop, timed, store) == {}
        graph = replace(loop, launch="graph")
        store.add(measure.fields_of(graph) | timed | {"median": 3e-3, "method": "graph"})
        assert campaign.idle_share(loop, timed, store) == {"idle": pytest.approx(0.25)}
        assert campaign.idle_share(loop, timed | {"median": 2e-3}, store) == {"idle": 0.0}
        assert campaign.idle_share(graph, timed | {"method": "graph"}, store) == {}

    def test_time_of_the_cases_that_are_left(self, tmp_path):
        store = ResultStore(tmp_path, ABOUT)
        chosen = [replace(c, provider="compile") for c in of(*[standins.FINE] * 41)]
        text = "41 left, about 5 min; the largest group of cases needs --minutes 1"
        assert campaign.left_out(chosen, store) == text
        store.add(measure.fields_of(chosen[-1]) | {"status": "measured", "wall_seconds": 1.0})
        assert campaign.left_out(chosen, store).startswith("40 left, about 1 min;")
        assert campaign.left_out(chosen[-1:], store) == "0 left"

    def test_a_busy_host_has_a_large_spread(self):
        calls = iter(range(1 << 30))

        def now_and_then():
            if next(calls) % 100 == 50:
                time.sleep(2e-3)

        timed = host.Timed("", "forward", nn.Identity(), now_and_then)
        assert busy.spread(timed, seconds=0.05) > 3
        # Without an argument, spread times torch's batch norm and ReLU.
        assert busy.spread(seconds=0.05) >= 1

    def test_ceilings_are_measured_in_a_child(self, tmp_path):
        with Child() as child:
            store = campaign.open_store(tmp_path, CPU, child, "tests.standins:measure_ceilings")
            assert store.environment["ceilings"] == standins.measure_ceilings(CPU)
            with pytest.raises(ChildFailed, match=r"tests\.standins:hang: TypeError"):
                campaign.open_store(tmp_path / "other", CPU, child, "tests.standins:hang")
        assert not (tmp_path / "other").exists()

    def test_other_device_is_refused(self, tmp_path):
        ResultStore(tmp_path, ABOUT)
        with pytest.raises(ValueError, match="results of device 'a device', but this is 'another'"):
            ResultStore(tmp_path, ABOUT | {"device": "another"})
