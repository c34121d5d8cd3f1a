"""Tests of the benchmarks: the clock, checks before timing, cases, reports and the command line."""

import itertools
import json
import os
import time
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from benchmarks import (
    busy,
    campaign,
    cases,
    clock,
    cost,
    libraries,
    measure,
    models,
    once,
    sites,
    variants,
)  # fmt: skip
from benchmarks.audit import budget
from benchmarks.check import WrongResult
from benchmarks.cli import app
from benchmarks.operations import formula, make_inputs
from benchmarks.profiling import group_of
from benchmarks.providers import PROVIDERS
from benchmarks.providers.base import Provider, by_autograd
from benchmarks.report import comparison, performance_page, pictures, tables
from benchmarks.store import ResultStore, load
from bnres import use_backend
from bnres.models import create_model
from tests.device import DEVICE

CPU = torch.device("cpu")
CEILINGS = {"copy": 1e10, "product": 1e11}
ABOUT = {
    "device": "a device", "torch": "2.13", "triton": "3.9", "bnres": "0", "commit": "abc",
    "backend": "aten", "date": "2026-01-01T00:00:00Z", "ceilings": CEILINGS,
}  # fmt: skip
SLEEP = 0.02
SITE = sites.Site("layer1", "bn_relu", 8, 8, 1)
CASE = cases.OpCase(SITE, "forward", "channels_last", "fp32", 4, "eager", smoke=True)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA events and graphs")
runner = CliRunner()


def provide(monkeypatch, name, function):
    """Registers ``function`` as the provider ``name``, and returns a case of this provider."""
    provider = Provider(name, lambda case: lambda inputs: by_autograd(function, inputs))
    monkeypatch.setitem(PROVIDERS, name, provider)
    return replace(CASE, provider=name)


class TestClock:
    def test_advances_only_by_timed_calls(self):
        ticking = clock.DeviceClock()
        timed = clock.prepare(ticking, lambda: lambda: time.sleep(SLEEP), CPU)
        assert ticking() == 0 and timed.method == "wall"
        time.sleep(SLEEP)
        assert ticking() == 0
        found = clock.durations(ticking, timed, 3)
        assert all(SLEEP <= seconds < 5 * SLEEP for seconds in found)
        assert ticking() == pytest.approx(sum(found))

    def test_slow_provider_measures_slower(self, monkeypatch):
        plain = formula(SITE, True)

        def slow(inputs):
            time.sleep(SLEEP)
            return plain(inputs)

        case = provide(monkeypatch, "slow", slow)
        fast = measure.measure(CASE, CPU, CEILINGS)
        found = measure.measure(case, CPU, CEILINGS)
        assert fast["median"] < SLEEP <= found["median"]
        assert found["share"] < fast["share"]
        assert found["bytes"] == fast["bytes"] == 3 * 4 * 8 * 8 * 8 * 4

    def test_rounds_and_copies(self):
        assert clock.rounds_for(1.0, 0.25) == 5 and clock.rounds_for(1e-6, 0.25) == 100
        assert clock.rounds_for(0.01, 0.25) == 25
        ticking = clock.DeviceClock()

        def once():
            ticking.seconds += 0.01

        assert clock.timed_rounds(ticking, clock.Timed(once, "loop", 0.0, calls=5), 1.0) == 20
        assert clock.copies(10, 50, 1e-4) == 15 and clock.copies(1, 10**9, 1e-4) == 64
        assert clock.copies(10**9, 50, 1e-4) == 5 and clock.copies(10**9, 50, 1e-3) == 1

    @needs_gpu
    @pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="other tests use the GPU too")
    def test_events_and_graph_agree(self):
        source = torch.rand(1 << 27, device="cuda")

        def make():
            target = torch.empty_like(source)
            # torch.neg is timed instead of a copy, because a copy runs differently in a CUDA graph.
            return lambda: torch.neg(source, out=target)

        ticking = clock.DeviceClock()
        found = {}
        for launch in ("auto", "graph"):
            timed = clock.prepare(ticking, make, source.device, launch=launch)
            found[timed.method] = min(clock.durations(ticking, timed, 20))
        assert found["events"] == pytest.approx(found["graph"], rel=0.1)

    @needs_gpu
    def test_a_graph_keeps_the_memory_of_its_calls(self):
        def make():
            source = torch.arange(1024, device="cuda")
            return lambda: source + 1

        timed = clock.prepare(clock.DeviceClock(), make, torch.device("cuda"))
        others = [torch.zeros(1024, dtype=torch.long, device="cuda") for _ in range(64)]
        timed.round()
        assert timed.method == "graph" and not any(map(torch.any, others))
        assert torch.equal(timed.replayed, torch.arange(1, 1025, device="cuda"))

    @needs_gpu
    def test_the_host_is_not_timed(self):
        x = torch.rand(1024, device="cuda")

        def slow():
            time.sleep(SLEEP)
            return x + 1

        ticking = clock.DeviceClock()
        timed = clock.prepare(ticking, lambda: slow, x.device, touched_bytes=8192)
        assert timed.method == "graph" and timed.host_seconds > SLEEP
        assert max(clock.durations(ticking, timed, 5)) < SLEEP / 10


@pytest.mark.parametrize("direction", ["forward", "backward", "eval"])
def test_wrong_provider_is_refused_before_it_is_timed(monkeypatch, direction):
    def without_relu(inputs):
        return formula(replace(SITE, operation="bn"), direction != "eval")(inputs)

    case = replace(provide(monkeypatch, "wrong", without_relu), direction=direction)
    ticking = clock.DeviceClock()
    with pytest.raises(WrongResult, match="output 0: relative error"):
        measure.prepare(case, CPU, ticking)
    assert ticking() == 0


def test_wrong_gradient_or_statistics_are_refused(monkeypatch):
    plain = formula(SITE, True)

    def half_gradient(inputs):
        (y,) = plain(inputs)
        return ((y + y.detach()) / 2,)

    def no_update(inputs):
        return formula(SITE, True)(inputs.to(inputs.x.dtype))

    case = provide(monkeypatch, "half", half_gradient)
    assert measure.measure(case, CPU, CEILINGS)["error"] < 1e-6
    with pytest.raises(WrongResult, match="gradient 0, of a tensor"):
        measure.measure(replace(case, direction="backward"), CPU, CEILINGS)
    case = provide(monkeypatch, "frozen", no_update)
    with pytest.raises(WrongResult, match="running statistic 0"):
        measure.measure(case, CPU, CEILINGS)


@pytest.mark.parametrize("provider", ["bnres", "eager"])
@pytest.mark.parametrize("operation", ["bn_add_relu_fork", "dual_bn_add_relu", "bn_relu_pool"])
def test_provider_agrees_with_the_formula(provider, operation):
    case = replace(CASE, site=replace(SITE, operation=operation), provider=provider)
    found = measure.measure(replace(case, direction="backward"), CPU, CEILINGS)
    assert found["error"] < 1e-5 and found["median"] > 0


class WithoutMeans(torch.autograd.Function):
    """Batch norm whose backward ignores that the statistics depend on the input."""

    @staticmethod
    def forward(ctx, x, norm):
        var = x.var((0, 2, 3), correction=0)
        ctx.scale = (norm.weight * (var + 1e-5).rsqrt()).detach()
        return torch.nn.functional.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, 0.1, 1e-5
        )

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.scale.view(1, -1, 1, 1), None


def test_backward_that_ignores_the_statistics_is_refused(monkeypatch):
    def function(inputs):
        y = WithoutMeans.apply(inputs.x, inputs.norm)
        plain = formula(replace(SITE, operation="bn"), True)(inputs.to(inputs.x.dtype))
        return (y + 0 * (inputs.norm.weight.sum() + inputs.norm.bias.sum()) + 0 * plain[0],)

    case = replace(provide(monkeypatch, "sums", function), direction="backward", dtype="fp32")
    case = replace(case, site=replace(SITE, operation="bn"))
    with pytest.raises(WrongResult, match="gradient 0, of a tensor"):
        measure.measure(case, CPU, CEILINGS)


@pytest.mark.parametrize("wrong", ["dtype", "layout"])
def test_wrong_dtype_or_layout_is_refused(monkeypatch, wrong):
    def function(inputs):
        (y,) = formula(SITE, True)(inputs)
        return (y.double() if wrong == "dtype" else y.contiguous(),)

    case = provide(monkeypatch, wrong, function)
    with pytest.raises(WrongResult, match=r"has dtype torch.float64|is not channels_last"):
        measure.measure(case, CPU, CEILINGS)


@pytest.mark.parametrize("net", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_step_in_bf16_is_near_fp32(net):
    """The logits' rounding errors in a bf16 step are less than half of the logits' tolerance."""
    case = cases.ModelCase("step", net, 32, 8, "eager", "bf16", "channels_last", "bnres")
    with use_backend("aten"):
        assert models.prepare(case, CPU).verify() < models.LOGITS_TOLERANCE["bf16"] / 2


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["eager", "graph"])
def test_step_in_fp16_trains_as_fp32(launch):
    """The gradients of the scaled loss are divided by the scale before the optimiser's step."""
    weights = {}
    for dtype in ("fp16", "fp32"):
        case = cases.ModelCase("step", "resnet18", 16, 4, launch, dtype, "channels_last", "eager")
        work = models.prepare(case, CPU)
        work.verify()
        before = [p.detach().clone() for p in work.model.parameters()]
        work.run()
        weights[dtype] = torch.cat(
            [
                (p - b).detach().flatten()
                for p, b in zip(work.model.parameters(), before, strict=True)
            ]
        )
    cosine = nn.functional.cosine_similarity(weights["fp16"], weights["fp32"], dim=0)
    assert cosine > models.COSINE["fp16"]
    assert weights["fp16"].norm() / weights["fp32"].norm() == pytest.approx(1, rel=0.05)


def test_wrong_net_is_refused(monkeypatch):
    case = cases.ModelCase(
        "step", "resnet18", 16, 4, "eager", "fp32", "channels_last", "bnres", True
    )
    monkeypatch.setattr(models, "_of_provider", lambda stock, case: _without_relu(stock))
    with pytest.raises(WrongResult, match="logits 0"):
        models.prepare(case, CPU).verify()


def _without_relu(model):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU):
            model.set_submodule(name, nn.Identity())
    return model


class TestCases:
    def test_ids_are_unique(self):
        for chosen in (cases.all_cases(), cases.smoke_cases()):
            assert len({case.id for case in chosen}) == len(chosen)

    def test_smoke_has_every_operation_direction_and_provider(self):
        def kinds(chosen):
            return {
                (c.suite, c.provider)
                + ((c.site.operation, c.direction, c.layout) if c.suite == "ops" else ())
                for c in chosen
            }

        assert kinds(cases.smoke_cases()) == kinds(cases.all_cases())

    def test_the_most_important_cases_come_first(self):
        ordered = cases.all_cases()
        assert [(c.suite, c.net, c.batch, c.launch, c.provider) for c in ordered[:12]] == [
            ("step", "resnet18", batch, launch, provider)
            for launch in ("graph", "eager")
            for batch in (256, 32)
            for provider in ("eager", "bnres", "compile")
        ]
        operations = ordered[12:72]
        assert {c.site.operation for c in operations} == set(cases.TELLING)
        assert {c.site.name for c in operations} == set(cases.LARGE_SITES)
        assert sum(map(cost.table_seconds, ordered[:72])) < 8 * 60
        late = [c.provider in cases.LATE for c in ordered]
        assert late == sorted(late) and sum(late) > 100
        telling = cases.telling_cases()
        assert telling == cases.all_cases()[: len(telling)] and 60 < len(telling) < 300

    @pytest.mark.parametrize("chosen", [cases.all_cases, cases.smoke_cases])
    def test_a_group_is_one_subject_and_its_baseline_comes_first(self, chosen):
        found = cases.groups(chosen())
        assert [case for group in found for case in group] == chosen()
        begun = set()
        for group in found:
            (subject,) = {case.subject for case in group}
            if subject not in begun:  # the first group has the most important providers
                assert group[0].provider in cases.BASELINES, group
                assert "bnres" in [case.provider for case in group]
            begun.add(subject)

    @pytest.mark.parametrize(
        ("net", "known"),
        [("resnet18", sites.RESNET18_SITES), ("resnet50", sites.RESNET50_SITES)],
    )
    def test_sites_are_the_nets_batch_norms(self, net, known):
        found = {}
        with torch.device("meta"):
            model = create_model(net, fused=False).eval()

            def note(module, inputs):
                key = tuple(inputs[0].shape[1:3])
                found[key] = found.get(key, 0) + 1

            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.register_forward_pre_hook(note)
            model(torch.empty(2, 3, 224, 224))
        expected = {}
        for site in known:
            key = site.channels, site.size
            expected[key] = expected.get(key, 0) + site.count
        assert found == expected


def record(subject, provider, median, **fields):
    """Returns the record of a measured case. ``subject`` names its site, ``median`` is in µs."""
    case = replace(CASE, site=replace(SITE, name=subject), provider=provider, smoke=False)
    seconds = median * 1e-6
    known = {"status": "measured", "median": seconds, "q1": seconds, "q3": seconds, "bytes": 12000}
    return measure.fields_of(case) | known | measure.rates(known, CEILINGS) | fields


class TestReport:
    def test_table_and_pictures(self, tmp_path):
        records = [
            record("stem", "bnres", 2.0, host_seconds=7e-6),
            record("stem", "eager", 5.0, note="by Native", timed_dtype="fp32"),
            record("stem", "compile", 3.0), record("layer1", "bnres", 4.0, timed_dtype="fp16"),
            measure.fields_of(replace(CASE, provider="cudnn-frontend"))
            | {"status": "skipped", "reason": "no"},
        ]  # fmt: skip
        for provider in ("bnres", "eager"):
            case = cases.ModelCase(
                "step", "resnet18", 224, 8, "eager", "bf16", "channels_last", provider
            )
            times = {"median": 4e-3, "q1": 4e-3, "q3": 4e-3, "images": 8}
            if provider == "eager":
                times |= {"idle": 0.125}
            records.append(measure.fields_of(case) | {"status": "measured"} | times)
            size = {"peak_bytes": 2_000_000, "held_bytes": 1_000_000}
            case = replace(case, suite="memory")
            records.append(measure.fields_of(case) | {"status": "measured"} | size)
        drawn = pictures.draw(tmp_path, ABOUT, records)
        assert {p.stem for p in drawn} == {"bandwidth", "speedup"}
        assert all(p.stat().st_size > 10_000 for p in drawn)
        text = tables.report(ABOUT, records, drawn)
        # At the ceiling of 10 GB/s, 12,000 bytes take 1.2 us, which is 60% of the median of 2.0 us.
        assert "| resnet18.stem | 2.0 (60%) | 5.0 (24%) | 3.0 (40%) | 2.50× | 1.50× | 7 |" in text
        assert "| resnet18.layer1 | 4.0 (30%) fp16 | - | - | - | - | - |" in text
        assert "| 4.00 (2,000) | 4.00 (2,000), idle 12% | 1.00× | - |" in text
        assert "Idle is the share of a training loop's time" in text
        assert ": peak | 2 (1.00×) | 2 (1.00×) |" in text
        assert "| cudnn-frontend | skipped | no | 1 |" in text
        assert "| eager | fp32 | by Native | 1 |" in text
        assert campaign.describe(records[1]).endswith("us, 24% of the possible speed; by Native")

    def test_comparison_reports_changes_beyond_noise(self):
        old = [record(name, "bnres", 10.0) for name in ("a", "b", "c", "d")]
        noisy = {"q1": 8e-6, "q3": 12e-6}
        new = [
            record("a", "bnres", 10.2), record("b", "bnres", 11.0), record("c", "bnres", 8.0),
            record("d", "bnres", 12.0, **noisy), record("e", "bnres", 1.0),
        ]  # fmt: skip
        found = comparison.compare((ABOUT, old), (ABOUT | {"commit": "def"}, new))
        assert [c.verdict for c in found.changes] == ["same", "slower", "faster", "same", "new"]
        assert [c.ratio for c in found.regressions] == [pytest.approx(1.1)]
        assert "commit: abc -> def" in found.table()

    def test_comparison_of_cases_without_two_times(self):
        old = [
            record("a", "bnres", 10.0, method="events"),
            record("b", "bnres", 10.0),
            record("c", "bnres", 10.0),
            record("d", "bnres", 10.0, status="failed"),
        ]
        new = [
            record("a", "bnres", 20.0, method="graph"),
            record("b", "bnres", 10.0, status="refused"),
        ]
        found = comparison.compare((ABOUT, old), (ABOUT, new))
        assert [c.verdict for c in found.changes] == ["other method", "lost", "absent"]
        assert [c.verdict for c in found.regressions] == ["lost"]
        assert "0 same, 1 other method, 1 absent, 0 new" in found.table()

    def test_page_shows_the_committed_results(self, tmp_path):
        p = performance_page
        for page, section in ((p.PAGE, p.section()), (p.README, p.headline())):
            text = page.read_text(encoding="utf-8")
            assert p.with_section(page, section) == text, "run python -m benchmarks report --page"
        (tmp_path / "page.md").write_text("no markers")
        with pytest.raises(ValueError, match=r"page\.md must contain the lines"):
            p.with_section(tmp_path / "page.md", "")

    def test_page_of_a_measured_run(self, tmp_path):
        for date, median in (("2026-01-01", 9.0), ("2026-02-01", 2.0)):
            folder = tmp_path / "a-gpu" / date
            store = ResultStore(folder, ABOUT)
            store.add(record("stem", "bnres", median))
        text = performance_page.section(tmp_path)
        assert "| resnet18.stem | 2.0 (60%) |" in text and "a device; torch 2.13" in text
        assert "9.0" not in text.split("Counted")[0]


class TestBudget:
    def test_each_call_that_is_allowed_still_occurs(self):
        recorded, _ = budget.load()
        calls = {budget.kernel_key(row): row["calls"] for row in recorded.kernels if row["calls"]}
        assert calls == budget.CALLS_ALLOWED

    def row(self, **changes):
        row = {
            "gpu": "sm_90", "kernel": "_bn_k", "case": "stem", "layout": "channels_last",
            "dtype": "bfloat16", "registers": 64, "spills": 0, "missing": "", "calls": 0,
            "in_flight": 0.5, "per_element": 8.0, "share": 0.4,
        }  # fmt: skip
        return row | changes

    @pytest.mark.parametrize(
        "change",
        [{"spills": 1}, {"in_flight": 0.4}, {"registers": 65}, {"missing": "x"},
         {"kernel": "unknown"}, {"layout": "contiguous"}, {"share": 0.45}, {"calls": 1}],
    )  # fmt: skip
    def test_machine_code_that_exceeds_its_budget(self, change):
        limits = budget.Found([], {}, {}, {}, budget.worst([self.row()]))
        rows = [self.row(), self.row(**change)]
        found = budget.Found([], {}, {}, {}, budget.worst(rows))
        assert len(budget.exceeded(found, limits, same_triton=True)) == 1
        assert budget.exceeded(limits, limits, same_triton=True) == []
        other_triton = budget.exceeded(found, limits, same_triton=False)
        assert len(other_triton) == (0 if {"registers", "share"} & set(change) else 1)

    def test_calls_in_loops_are_not_allowed_even_if_recorded(self):
        limits = budget.Found([], {}, {}, {}, budget.worst([self.row(calls=1)]))
        problem = "sm_90 _bn_k channels_last bfloat16: 1 calls in loops, allowed are 0"
        assert budget.exceeded(limits, limits, same_triton=True) == [problem]
        names = {"gpu": "sm_100", "kernel": "_conv_bn_act_kernel"}
        two, three = (
            budget.Found([], {}, {}, {}, budget.worst([self.row(**names, calls=calls)]))
            for calls in (2, 3)
        )
        assert budget.exceeded(two, two, same_triton=True) == []
        assert len(budget.exceeded(three, three, same_triton=True)) == 1

    def test_worst_share_is_that_of_one_launch(self):
        not_counted = dict.fromkeys(("share", "per_element", "calls", "in_flight"))
        (row,) = budget.worst([self.row(**not_counted)])
        assert (row["share"], row["calls"], row["in_flight"], row["at"]) == (None, None, None, "")
        more = {"share": 0.6, "per_element": 7.0, "case": "layer1"}
        (row,) = budget.worst([self.row(**not_counted), self.row(**more), self.row(calls=2)])
        assert (row["share"], row["per_element"], row["at"]) == (0.6, 7.0, "layer1")
        assert (row["calls"], row["in_flight"]) == (2, 0.5)

    def test_memory_that_exceeds_its_budget(self):
        row = {"operation": "bn", "step": "eval", "layout": "x", "lanes": 2.0, "sectors": 2.0}
        limits = budget.Found([row], {"fused": 900}, {"fused": 100}, {"fused": 160}, [])
        wider = row | {"sectors": 2.1}
        more = budget.Found([wider], {"fused": 901}, {"fused": 101}, {"fused": 161}, [])
        assert budget.exceeded(more, limits, True) == [
            "bytes moved, fused: 901, budget 900",
            "bytes held for backward, fused: 101, budget 100",
            "launches in a step, fused: 161, budget 160",
            "bn eval x: 2.1000 S in sectors, budget 2.0000",
        ]


class TestCommandLine:
    CHOICE = ("--only", "ops/.*resnet18.stem/.*contiguous.*eager$")

    @pytest.mark.slow
    def test_run_report_compare(self, tmp_path, monkeypatch):
        out = str(tmp_path / "run")
        monkeypatch.setattr(busy, "spread", lambda: 1.3)
        result = runner.invoke(app, ["run", "--minutes", "1", "--out", out, *self.CHOICE])
        assert result.exit_code == 0, result.output
        assert result.stderr == (
            "warning: the host is busy: on average, calls of torch's batch norm take 1.30 times "
            "their shortest time (the limit is 1.25), so host times will be too long; stop other "
            "programs and run this command again with a new folder\n"
        )
        monkeypatch.setattr(busy, "spread", lambda: 1.25)
        about, records = load(tmp_path / "run")
        assert records and all(r["status"] == "measured" for r in records)
        assert about["ceilings"]["copy"] > 1e8 and about["torch"] == torch.__version__
        again = runner.invoke(app, ["run", "--minutes", "1", "--out", out, *self.CHOICE])
        assert "0 cases measured, 0 left" in again.output and again.stderr == ""
        result = runner.invoke(app, ["report", out])
        assert result.exit_code == 0, result.output
        assert "# Benchmarks" in (tmp_path / "run" / "report.md").read_text()
        same = runner.invoke(app, ["compare", out, out])
        assert same.exit_code == 0 and f"0 faster, {len(records)} same" in same.output
        slow = [r | {k: 2 * r[k] for k in ("median", "q1", "q3")} for r in records]
        other = tmp_path / "slow"
        other.mkdir()
        (other / "environment.json").write_text(json.dumps(about))
        (other / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in slow))
        result = runner.invoke(app, ["compare", out, str(other)])
        assert result.exit_code == 1 and "slower" in result.output

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["run", "--only", "eagre"], "only must match the id of a case, got 'eagre'"),
            (["run", "--only", "("], "only must be a regular expression, got '(': "),
            (["report"], "folders must name at least one folder"),
            (["report", "/nowhere"], "/nowhere is not a folder of results"),
            pytest.param(
                ["host"], "unset TRITON_INTERPRET",
                marks=pytest.mark.skipif(DEVICE == "cuda", reason="there is no interpreter then"),
            ),
            (["profile", "--net", "vgg"], "net must be one of resnet18, resnet50, got 'vgg'"),
        ],
    )  # fmt: skip
    def test_bad_input(self, arguments, message):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 2 and message in result.output

    def test_profile(self, tmp_path):
        trace = tmp_path / "trace.json"
        result = runner.invoke(
            app,
            ["profile", "--provider", "eager", "--batch", "2", "--image", "16", "--dtype", "fp32",
             "--trace", str(trace)],
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        shares = {line.split("  ")[0]: line for line in result.output.splitlines()}
        assert "%" in shares["convolution"] and "%" in shares["batch norm"]
        assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("_bn_bwd_reduce_kernel", "batch norm"),
        ("_conv_bn_act_kernel", "convolution"),
        ("_bn_max_pool_kernel", "batch norm"),
        ("void at::native::batch_norm_collect_statistics_channels_last_kernel<>", "batch norm"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", "convolution"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<>", "batch norm"),
        ("triton_red_fused__native_batch_norm_legit_functional_1", "batch norm"),
        ("void at::native::max_pool_forward_nhwc<>", "pooling"),
        ("void at::native::multi_tensor_apply_kernel<>", "optimiser"),
        ("void at::native::vectorized_elementwise_kernel<>", "other"),
    ],
)
def test_kernels_fall_into_groups(name, group):
    assert group_of(name) == group


def test_inputs_are_fresh_and_reproducible():
    first, second = (
        make_inputs(SITE, "backward", 2, "contiguous", torch.float32, CPU) for _ in "ab"
    )
    assert torch.equal(first.x, second.x) and first.x.data_ptr() != second.x.data_ptr()
    copy = first.to(torch.float64)
    assert copy.x.dtype == torch.float64 and copy.norm.running_mean.dtype == torch.float64
    assert len(copy.leaves) == 3 and all(leaf.requires_grad for leaf in copy.leaves)


def test_table_of_models(monkeypatch, tmp_path):
    def models():
        layers = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)
        yield "net", lambda: nn.Sequential(*layers), libraries.images(4)

    monkeypatch.setattr(libraries, "LIBRARIES", {"torchvision": models, "not_installed": models})
    file, said = tmp_path / "models.md", []
    libraries.run(file, said.append)
    text = file.read_text(encoding="utf-8")
    assert said == ["torchvision net"]
    assert "| net | 2 | 2 | 1 × conv-bn-act, 1 × bn |  |" in text
    assert f"torch {torch.__version__}" in text and "skipped: not_installed." in text


def test_operations_for_a_hardware_profiler(aten):
    assert once.run(CPU) == 10


@pytest.mark.parametrize("kernel", variants.GRIDS)
def test_kernels_run_with_other_configurations(kernel):
    calls = variants.calls((2, 8, 8, 8), "channels_last", torch.device(DEVICE))
    _, other = itertools.islice(variants.variants(kernel), 2)
    assert variants.measure(kernel, [calls], other) > 0
