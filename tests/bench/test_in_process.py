"""The measurements run and count right; their speeds are nobody's business here."""

import json
from argparse import Namespace

import pytest
import torch

from icarus.bench import decode, measure, replay, train
from icarus.streams import TwoStreams
from tiny_models import tiny, with_adapters

SPEECHES = [replay.Speech("first", 6, 9), replay.Speech("second", 12, 15), replay.Speech("first", 16, 20)]


def test_replay_counts_what_each_way_prefills_and_holds():
    tokens = torch.randint(1, 100, (1, 20), generator=torch.Generator().manual_seed(0))
    model = with_adapters(tiny("llama"), ["first", "second"], seed=1)
    ours = replay.icarus(TwoStreams(model), tokens, SPEECHES)
    theirs = replay.conventional(model, tokens, SPEECHES)
    # ICaRus: each position once, the generated ones by steps. Conventionally: first 0-6 and 8-16, second 0-12.
    assert ours.prefilled_tokens == 6 + (12 - 8) + (16 - 14)
    assert theirs.prefilled_tokens == 6 + 12 + (16 - 8)
    per_token = ours.kv_bytes // 19
    assert ours.kv_bytes == 19 * per_token
    assert theirs.kv_bytes == (19 + 14) * per_token


def test_alternate_runs_the_sides_in_turn_and_leaves_the_first_round_out():
    calls = []
    seconds = measure.alternate({"x": lambda: calls.append("x"), "y": lambda: calls.append("y")}, 2, "test")
    assert calls == ["x", "y"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"x": 2, "y": 2}


def test_peak_memory_sees_what_was_freed_again():
    assert 60e6 < measure.peak_memory(lambda: torch.ones(64 * 1024**2 // 4).sum()) < 100e6


@pytest.mark.parametrize("bench", [decode, train])
def test_bench_reports_every_side(bench, monkeypatch, capsys):
    monkeypatch.setattr(measure, "read_bandwidth", lambda: 1e10)
    monkeypatch.setattr(bench.base_model, "load", lambda *args, **kwargs: (tiny("llama", vocab_size=2048), None))
    for name, value in {"CONTEXT": 16, "PROMPT": 16, "COMPLETION": 4, "RANK": 2}.items():
        monkeypatch.setattr(bench, name, value, raising=False)
    report = bench.run(Namespace(base="tiny", dtype="float32", repeats=2))
    assert json.loads(json.dumps(report)) == report
    if bench is decode:
        assert set(report["batches"]) == {"1", "8"}
        assert set(report["batches"]["1"]["steps"]) == {"base", "conventional", "icarus", "icarus, two passes"}
    else:
        assert report["loss_on_completion"]["steps"]["icarus"]["peak_bytes"] > 0
    printed = capsys.readouterr().out
    assert "ICaRus" in printed
    assert ("memory" in printed) is (bench is train)
