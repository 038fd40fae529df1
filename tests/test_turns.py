"""``icarus generate``: what a list of turns may hold, and what is printed."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from home import GENERATE, TEAM, TURNS, Capture
from icarus import Specialists, cli, turns
from icarus.errors import InputError

pytestmark = pytest.mark.usefixtures("at_home")

KEYS = {
    "reused_tokens",
    "model",
    "text",
    "token_ids",
    "finish_reason",
    "encoded_tokens",
    "cached_tokens",
    "kv_bytes",
    "seconds",
}


def test_generate_prints_one_object_a_turn(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main([*GENERATE, *TEAM, "--json", "-"]) == 0
    done = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [turn.keys() for turn in done] == [KEYS] * 3
    assert [turn["model"] for turn in done] == ["one", "two", "base"]
    first, second, third = done
    assert (first["encoded_tokens"], first["cached_tokens"]) == (3 + len(first["token_ids"]) - 1, 0)
    assert second["cached_tokens"] == first["encoded_tokens"]  # the cache that the other one left
    assert len(second["token_ids"]) <= 2
    assert third["kv_bytes"] > second["kv_bytes"] > first["kv_bytes"] > 0

    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(TURNS)))
    assert cli.main(["generate", "--turns", "-", *TEAM]) == 0
    assert capsys.readouterr().out == "".join(turn["text"] + "\n" for turn in done)


@pytest.mark.parametrize(
    ("script", "what"),
    [
        ({}, "non-empty JSON list"),
        ([], "non-empty JSON list"),
        (["a"], "turn 1 of .* is not a JSON object"),
        ([{}, {"modle": "one"}], "turn 2 of .* unknown key 'modle'; the known keys are model, append"),
        ([{"append": 5}], "turn 1.*'append' must be str, not 5"),
        ([{"append": "a", "messages": []}], "turn 1.*both"),
        ([{"max_new_tokens": True}], "'max_new_tokens' must be int"),
        ([{"max_new_tokens": "9"}], "'max_new_tokens' must be int"),
        ([{"temperature": [1]}], "'temperature' must be int or float"),
        ([{"stop": ["a", 5]}], "'stop' must be"),
    ],
)
def test_bad_turns_are_refused_before_anything_is_loaded(script: Any, what: str, tmp_path: Path) -> None:
    (tmp_path / "turns.json").write_text(json.dumps(script))
    with pytest.raises(InputError, match=what):
        turns.read(str(tmp_path / "turns.json"))


def test_an_unknown_model_is_named_before_anything_runs(team: Specialists, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "context", lambda: pytest.fail("something ran"))
    with pytest.raises(InputError, match="'three'; there are base, one, two"):
        next(turns.play(team, [{"append": "a", "model": "one"}, {"model": "three"}]))


def test_an_unknown_model_is_named_before_anything_is_loaded(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Specialists, "load", lambda *args, **kw: pytest.fail("something was loaded"))
    (tmp_path / "turns.json").write_text(json.dumps([{"append": "a", "model": "three"}]))
    assert cli.main(["generate", "--turns", str(tmp_path / "turns.json"), *TEAM]) == 2
    assert "'three'; load it with --adapter three=PATH" in capsys.readouterr().err
