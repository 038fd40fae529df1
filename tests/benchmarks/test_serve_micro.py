"""The parts of ``benchmarks/serve_micro`` that need no vLLM, and a whole run with engines that only pretend."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.serve_micro import __main__ as command
from benchmarks.serve_micro import bounds, engines, ratios, report
from benchmarks.serve_micro.engine_process import EngineFailed, EngineProcess
from benchmarks.serve_micro.plan import ADAPTERS, BLOCK, SYSTEMS, Side, Sizes, measurements, rest_of
from icarus import adapter
from saved import save_base
from tiny_models import tiny

SIZES = Sizes(prompt=100, steps=4, starts=1, repeats=3, vocabulary=50, seed=0)
PLAN = {measurement.name: measurement for measurement in measurements(SYSTEMS)}
OURS, THEIRS, LENT = Side("icarus", True), Side("stock", True), Side("icarus", False)


# ----------------------------------------------------------------------------------------- order and prompts


def test_every_other_round_goes_backwards() -> None:
    rounds = list(PLAN["decode, batch 1"].rounds(2))
    names = [side.name for side in PLAN["decode, batch 1"].sides]
    assert [number for number, _ in rounds] == [-1, 0, 1]
    assert [[side.name for side in sides] for _, sides in rounds] == [names[::-1], names, names[::-1]]
    assert names[:4] == ["base", "stock", "conventional", "icarus"]
    assert names[4:] == ["base model on stock", "base model on conventional", "base model on icarus"]


def test_the_slow_chain_is_taken_once() -> None:
    rounds = [[side.name for side in sides] for _, sides in PLAN["chain"].rounds(3)]
    assert rounds == [["stock", "conventional", "icarus"], ["icarus", "conventional"], ["conventional", "icarus"]]


def test_without_adapters_there_is_no_chain() -> None:
    assert {measurement.name for measurement in measurements(["base"])} == set(PLAN) - {"chain"}


@pytest.mark.parametrize("name", PLAN)
def test_prompts_are_new_in_every_round_and_equal_on_all_engines(name: str) -> None:
    measurement = PLAN[name]

    def prompts(side: Side, round_: int) -> list[tuple[int, ...]]:
        return [tuple(request["prompt"]) for request in measurement.command(side, round_, SIZES)["requests"]]

    assert prompts(OURS, 0) == prompts(THEIRS, 0)
    kinds = [prompts(side, round_) for side in (OURS, LENT) for round_ in (-1, 0, 1)]
    requests = 1 if measurement.turns > 1 else len(kinds[0])
    assert len({prompt for kind in kinds for prompt in kind}) == requests * len(kinds)


def test_requests_of_a_batch_take_the_adapters_in_turn() -> None:
    requests = PLAN["decode, batch 16"].command(OURS, 1, SIZES)["requests"]
    assert [request["adapter"] for request in requests] == [f"agent-{(1 + i) % 8}" for i in range(16)]
    lent = PLAN["decode, batch 8"].command(LENT, 1, SIZES)["requests"]
    assert {request["adapter"] for request in lent} == {None}
    prefill = PLAN["prefill"].command(OURS, 1, SIZES)["requests"]
    assert [request["adapter"] for request in prefill] == ["agent-1", "agent-2", "agent-3"]
    assert len({tuple(request["prompt"]) for request in prefill}) == len(prefill)
    chain = PLAN["chain"].command(OURS, 2, SIZES)["requests"]
    assert [request["adapter"] for request in chain] == [f"agent-{i}" for i in range(8)]


def test_what_a_figure_is() -> None:
    decode, prefill, chain = PLAN["decode, batch 8"], PLAN["prefill"], PLAN["chain"]
    assert decode.seconds({"step_seconds": [0.5, 0.1, 0.2]}) == 0.2
    assert decode.figure(0.2, SIZES) == pytest.approx(40)
    prefills = {"turns": [{"seconds": 2}, {"seconds": 0.5}, {"seconds": 0.1}]}
    assert prefill.figure(prefill.seconds(prefills), SIZES) == pytest.approx(200)
    assert chain.figure(chain.seconds({"turns": [{"seconds": 0.5}, {"seconds": 1}]}), SIZES) == 1.5


# ----------------------------------------------------------------------------------------- ratios


def test_icarus_is_compared_with_every_peer_and_the_base_model_with_itself() -> None:
    pairs = {(ratio.measurement, ratio.side, ratio.peer) for ratio in ratios.RATIOS}
    assert len(pairs) == len(ratios.RATIOS)
    for name in ("decode, batch 1", "decode, batch 8", "decode, batch 16", "prefill"):
        assert {(name, "icarus", peer) for peer in ("base", "stock", "conventional")} <= pairs
    assert {("chain", "icarus", peer) for peer in ("stock", "conventional")} <= pairs
    assert all(peer == "base" for _, side, peer in pairs if side.startswith("base model on"))
    measured = {name: {side.name for side in measurement.sides} for name, measurement in PLAN.items()}
    assert all({side, peer} <= measured[name] for name, side, peer in pairs)


def test_a_ratio_is_of_medians_with_the_range_of_rounds() -> None:
    result = ratios.Ratio("m", "us", "them").result([{"us": [1.0, 2.0, 1.0], "them": [2.0, 3.0, 9.0]}])
    assert (result["value"], result["lowest"], result["highest"]) == (3.0, 1.5, 9.0)


def test_starts_are_compared_each_by_itself() -> None:
    """The machine may be slower in one of them, for both sides."""
    starts = [{"us": [1.0], "them": [2.0]}, {"us": [10.0], "them": [30.0]}, {"us": [2.0], "them": [2.0]}]
    result = ratios.Ratio("m", "us", "them").result(starts)
    assert (result["value"], result["lowest"], result["highest"]) == (2.0, 1.0, 3.0)
    assert result["starts"] == [2.0, 3.0, 1.0]


def test_a_side_that_took_part_once_is_compared() -> None:
    result = ratios.Ratio("chain", "icarus", "stock").result([{"icarus": [1.0, 2.0, 3.0], "stock": [30.0]}])
    assert (result["value"], result["lowest"], result["highest"]) == (15.0, 30.0, 30.0)


def test_ratios_of_engines_that_were_left_out_are_left_out() -> None:
    results = ratios.results([{"prefill": {"icarus": [1.0], "base": [1.0]}, "chain": {"icarus": [1.0]}}])
    assert [ratio["what"] for ratio in results] == ["prefill: icarus over base"]


@pytest.mark.parametrize(("cached", "computed"), [(992, 1056), (960, 1280), (0, 8000)])
def test_what_was_not_in_the_cache_was_prefilled(cached: int, computed: int) -> None:
    turns = [{"prompt_tokens": 1000, "cached_tokens": 0 if turn == 0 else cached} for turn in range(8)]
    assert report.prefilled({"turns": turns}) == computed


@pytest.mark.parametrize(("prompt", "rest"), [(1, 1), (BLOCK, BLOCK), (BLOCK + 1, 1), (1000, 8)])
def test_at_least_one_token_of_a_cached_prompt_is_computed(prompt: int, rest: int) -> None:
    assert rest_of(prompt) == rest


# ----------------------------------------------------------------------------------------- bounds

MACHINE = bounds.Machine(read_bytes_per_s=1e3, flops_per_s=1e3)
SHAPE = bounds.Shape(layer_weights=100, head_weights=10, kv_per_token=4, queries=6, bytes_per_number=2)


def test_a_bound_by_hand() -> None:
    work = bounds.Work(rows=3, sampled=2, context=5, pairs=7, adapted=1, adapters=1, adapter_weights=20)
    bound = bounds.bound(MACHINE, SHAPE, [work])
    assert bound["reading_ms"] == 2 * (100 + 10 + 20 + 5 * 4)
    assert bound["arithmetic_ms"] == 2 * (3 * 100 + 2 * 10 + 20 + 2 * 7 * 6)
    assert (bound["bound_ms"], bound["by"]) == (bound["arithmetic_ms"], "arithmetic")
    one = bounds.bound(bounds.Machine(1e3, 1e6), SHAPE, [replace(work, times=4)])
    assert (one["bound_ms"], one["by"]) == (4 * bound["reading_ms"], "reading")


def works(name: str, side: Side, sizes: Sizes = SIZES) -> list[bounds.Work]:
    return PLAN[name].works(side, sizes, adapter_weights=20)


def test_the_work_of_a_decode_step() -> None:
    (base,), (ours,), (theirs,) = (works("decode, batch 16", side) for side in (Side("base", False), OURS, THEIRS))
    assert (base.rows, theirs.rows, ours.rows) == (16, 16, 32)
    assert base.context == theirs.context == ours.context == 16 * (100 + 2)
    assert (base.adapters, theirs.adapters, ours.adapters) == (0, 8, 8)
    assert works("decode, batch 8", LENT)[0].rows == 8


def test_the_work_of_a_prefill_is_the_base_models_and_one_row() -> None:
    (base,), (ours,), (theirs,) = (works("prefill", side) for side in (Side("base", False), OURS, THEIRS))
    assert (base.rows, ours.rows, theirs.rows) == (100, 101, 100)
    assert (base.pairs, ours.pairs) == (5050, 5150)
    assert (base.adapted, ours.adapted, theirs.adapted) == (0, 1, 100)


def test_the_work_of_a_chain_has_one_prefill_or_eight() -> None:
    ours, theirs = works("chain", OURS), works("chain", THEIRS)
    assert sum(work.rows * work.times for work in theirs) == 8 * 15 + 8 * 100
    assert sum(work.rows * work.times for work in ours) == 2 * 8 * 15 + 101 + 7 * (4 + 1)


@pytest.mark.parametrize("tied", [True, False])
def test_the_shape_counts_every_weight_that_a_step_reads(tied: bool) -> None:
    model = tiny("llama", tie_word_embeddings=tied)
    shape, embeddings = bounds.Shape.of(model), model.get_input_embeddings().weight.numel()
    total = sum(weight.numel() for weight in model.parameters())
    assert shape.layer_weights + shape.head_weights == total - (0 if tied else embeddings)
    assert shape.bytes_per_number == 4


def test_the_machine_is_measured() -> None:
    assert bounds.matrix_speed(torch.float32, size=64) > 0


# ----------------------------------------------------------------------------------------- adapters


def test_random_adapters_differ_and_none_is_zero(tmp_path: Path) -> None:
    base = str(save_base(tmp_path / "base"))
    adapters = engines.make_adapters(base, tmp_path, ["base", "stock", "icarus"])
    assert adapters["base"] == {}
    for system, ours in (("stock", False), ("icarus", True)):
        assert len(adapters[system]) == ADAPTERS
        assert {adapter.is_icarus(folder) for folder in adapters[system].values()} == {ours}
        one, other, *_ = (_tensors(folder) for folder in adapters[system].values())
        assert all(weight.any() and not torch.equal(weight, other[name]) for name, weight in one.items())
        assert any("k_proj" in name for name in one) != ours


def _tensors(folder: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "adapter_model.safetensors")


# ----------------------------------------------------------------------------------------- processes

ECHO = """if True:
    import json, sys, time
    for line in sys.stdin:
        command = json.loads(line)
        print("seen", command, file=sys.stderr, flush=True)
        if command.get("do") == "die":
            sys.exit(7)
        if command.get("do") == "sleep":
            time.sleep(1000)
        print(json.dumps(command), flush=True)
"""


def echo(folder: Path) -> EngineProcess:
    return EngineProcess("echo", folder / "log", os.environ, [sys.executable, "-c", ECHO])


def gone(engine: EngineProcess) -> bool:
    try:
        os.kill(engine._process.pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_an_engine_answers_and_is_gone_behind_the_block(tmp_path: Path) -> None:
    with echo(tmp_path) as engine:
        assert engine.ask({"do": "this"}) == {"do": "this"}
        assert engine.cpu_seconds() >= 0
        assert not gone(engine)
    assert gone(engine)


def test_an_engine_that_dies_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    with echo(tmp_path) as engine:
        with pytest.raises(EngineFailed, match=r"'echo' ended with status 7. The last lines of .*:\n  seen .*die"):
            engine.ask({"do": "die"})
        with pytest.raises(EngineFailed, match="status 7"):
            engine.ask({"do": "this"})


def test_an_error_of_an_engine_is_raised(tmp_path: Path) -> None:
    with echo(tmp_path) as engine, pytest.raises(EngineFailed, match="too large"):
        engine.ask({"error": "too large"})


INTERRUPTED = """if True:
    import sys
    from pathlib import Path
    from benchmarks.serve_micro.engine_process import EngineProcess
    with EngineProcess("echo", Path(sys.argv[1]), {}, [sys.executable, "-c", sys.argv[2]]) as engine:
        print(engine._process.pid, flush=True)
        engine.ask({"do": "sleep"})
"""


def test_ctrl_c_leaves_nothing_running(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", INTERRUPTED, str(log), ECHO]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  # a shell ignores it for what runs behind
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, preexec_fn=heed, **pipes) as parent:
        assert parent.stdout is not None
        engine = int(parent.stdout.readline())
        while "sleep" not in log.read_text():
            time.sleep(0.05)
        parent.send_signal(signal.SIGINT)
        assert parent.wait(timeout=60) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(engine, 0)


# ----------------------------------------------------------------------------------------- the command

PRETENDED = """if True:
    import json, os, sys
    plugin = os.environ["VLLM_PLUGINS"]
    assert os.environ.get("ICARUS_CPU_LORA") is None
    lora = json.loads(sys.stdin.readline())["engine"].get("enable_lora", False)
    print(json.dumps({"plugins": plugin}), flush=True)
    slow = 1.0 if plugin or not lora else 100.0
    seen = set()
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "profile":
            print(json.dumps({"table": "aten::mm"}), flush=True)
            continue
        if command["do"] == "decode":
            print(json.dumps({"step_seconds": [slow] * command["steps"]}), flush=True)
            continue
        turns = []
        for request in command["requests"]:
            length = len(request["prompt"])
            cached = (length - 1) // 32 * 32 if str(request["prompt"]) in seen else 0
            seen.add(str(request["prompt"]))
            turns.append({"seconds": slow, "prompt_tokens": length, "cached_tokens": cached, "tokens": 1})
        print(json.dumps({"turns": turns}), flush=True)
"""


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pretended(EngineProcess):
        def __init__(self, name: str, log: Path, environment: dict[str, str]) -> None:
            super().__init__(name, log, environment, [sys.executable, "-c", PRETENDED])

    monkeypatch.setattr(engines, "EngineProcess", Pretended)
    monkeypatch.setattr(engines, "has_vllm", lambda: True)
    monkeypatch.setattr(bounds.Machine, "measured", classmethod(lambda cls, dtype: MACHINE))
    monkeypatch.setattr(engines, "RANK", 2)
    monkeypatch.setenv("ICARUS_CPU_LORA", "0")


WORDS = ["--starts", "3", "--repeats", "2", "--prompt-tokens", "40", "--steps", "3"]


def test_a_whole_run(pretended: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, target, profile = save_base(tmp_path / "base"), tmp_path / "report.json", tmp_path / "deep" / "profile"
    assert command.main([*WORDS, "--base", str(base), "--json", str(target), "--profile", str(profile)]) == 0
    report = json.loads(target.read_text())
    assert set(report) == {"settings", "machine", "ratios", "measurements"}
    assert {name: about["plugins"] for name, about in report["settings"]["engines"].items()} == {
        "base": "",
        "stock": "",
        "conventional": "icarus",
        "icarus": "icarus",
    }
    samples = json.loads(gzip.decompress((tmp_path / "report-samples.json.gz").read_bytes()))
    assert (len(samples["prefill"]["icarus"]), len(samples["chain"]["stock"])) == (3 * 2, 3)
    ratio = {entry["what"]: entry for entry in report["ratios"]}
    assert ratio["decode, batch 8: icarus over stock"]["starts"] == [100, 100, 100]
    assert ratio["chain: icarus over conventional"]["value"] == 1
    assert report["measurements"]["chain"]["sides"]["icarus"]["prefilled_tokens"] == 40 + 7 * 8
    assert sorted(path.name for path in profile.iterdir()) == sorted(f"{system}.txt" for system in SYSTEMS)
    assert (profile / "icarus.txt").read_text().count("aten::mm") == 4
    printed = capsys.readouterr()
    assert "icarus over stock" in printed.out
    assert printed.err.count("decode, batch 1, round 2 of 2") == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--systems", "base", "vapour"], "'vapour'"),
        (["--prompt-tokens", "2048"], "2048 tokens"),
        (["--profile", "/dev/null/here"], "/dev/null/here"),
    ],
    ids=["systems", "prompt", "profile"],
)
def test_bad_input(words: list[str], said: str, pretended: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*WORDS, *words]) == 2
    assert said in capsys.readouterr().err


def test_without_vllm_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(engines, "has_vllm", lambda: False)
    assert command.main(WORDS) == 2
    assert "pip install 'icarus-llm[cpu]'" in capsys.readouterr().err
