"""The programs in examples/ run as they stand, here on a tiny model. ``handover.py`` needs a server."""

from __future__ import annotations

import re
import runpy
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from icarus import adapter, cli, turns
from icarus.evaluate import read_task
from saved import save_adapter, save_base

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *words: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_a_specialist_is_trained_and_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, output = save_base(tmp_path / "base"), tmp_path / "dates"
    options = "--base", base, "--output", output, "--steps", 1, "--rows", 1
    run("train_specialist.py", *options, monkeypatch=monkeypatch)
    assert adapter.verify(output, base).rank == 8
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split(":")[0].strip() for line in lines] == ["base", "dates"]


def test_a_task_asks_for_queries() -> None:
    task = read_task(EXAMPLES / "sql.yaml")
    rows = (EXAMPLES / "rows" / "sql.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(task.items) == len(rows)
    assert task.items[0].reference == "select population from t where city = 'Lima'"


def test_a_team_works_in_one_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words: list[object] = ["--base", save_base(tmp_path / "base"), "--limit", 4, "--columns", "a", "--question", "b"]
    for seed, name in enumerate(("planner", "sql", "explainer"), 1):
        words += ["--specialist", f"{name}={save_adapter(tmp_path / name, seed)}"]
    run("team.py", *words, monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    turns = [(int(new), int(cached)) for new, cached in re.findall(r"(\d+) tokens encoded, (\d+) from", out)]
    assert len(turns) == 3
    assert all(sum(before) == after[1] for before, after in pairwise(turns))  # nothing is encoded twice
    assert out.splitlines()[-1].endswith("one copy for 4 models")


def test_turns_can_be_read() -> None:
    assert [turn["model"] for turn in turns.read(str(EXAMPLES / "turns.json"))] == ["planner", "sql"]


def test_the_team_of_the_file_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = yaml.safe_load((EXAMPLES / "team.yaml").read_text(encoding="utf-8"))
    changed = {"base": str(save_base(tmp_path / "base")), "output": str(tmp_path / "team"), "max_steps": 1}
    file = tmp_path / "team.yaml"
    file.write_text(yaml.safe_dump({**keys, **changed, "prepare": {"max_steps": 1}}), encoding="utf-8")
    monkeypatch.chdir(EXAMPLES.parent)
    assert cli.main(["train", "--team", str(file)]) == 0
    for name in keys["specialists"]:
        adapter.verify(tmp_path / "team" / name, tmp_path / "team" / "base")
