"""``icarus eval``: what it prints, what it writes, and that an interrupted one loses nothing."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import yaml

from home import BASE, TEAM, Capture
from icarus import cli
from icarus.evaluate import Outcome, Side, progress
from icarus.evaluate.report import summary
from saved import save_rows

TASK = {"data": "rows.jsonl", "prompt": "{{q}}", "completion": "{{a}}", "scorer": "token_f1", "max_new_tokens": 3}
CHOICE = {"data": "rows.jsonl", "prompt": "{{q}}", "choices": ["a", "bc"], "answer": "{{right}}", "scorer": "choice"}


@pytest.fixture
def folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, for a command that writes."""
    shutil.copytree(home, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    save_rows(Path("rows.jsonl"), *({"q": "why " * n, "a": f"as {n}", "right": n % 2} for n in (1, 2, 3, 4)))
    Path("words.yaml").write_text(yaml.safe_dump(TASK))
    Path("pick.yaml").write_text(yaml.safe_dump(CHOICE))
    Path("code.yaml").write_text(yaml.safe_dump(TASK | {"scorer": "code", "reference": "assert True"}))
    return tmp_path / "home"


EVAL = ["eval", *TEAM, "--task", "words.yaml", "pick.yaml", "--json", "report.json", "--batch-size", "2"]


def test_all_sides_over_all_tasks(folder: Path, capsys: Capture) -> None:
    assert cli.main([*EVAL, "--limit", "3", "--against", "one"]) == 0
    out = capsys.readouterr().out
    assert "words: 3 items" in out
    assert "over one" in out
    assert "drift/token" in out  # whole, though this is no terminal and the table wider than one
    report = json.loads(Path("report.json").read_text())
    assert report["settings"]["dtype"] == "float32"
    assert report["settings"]["sides"].keys() == {"base", "one", "two"}
    assert len(report["items"]) == 2 * 3 * 3
    for task, sides in report["tasks"].items():
        assert [figures["kind"] for figures in sides.values()] == ["base", "icarus", "icarus"]
        for side, figures in sides.items():
            items = [i for i in report["items"] if (i["task"], i["side"]) == (task, side)]
            assert figures["score"] == pytest.approx(np.mean([i["score"] for i in items]))
            tokens = sum(i["tokens"] for i in items)
            assert figures["loss"] == pytest.approx(sum(i["loss"] * i["tokens"] for i in items) / tokens)
            assert ("difference" in figures) == (side != "one")
            assert ("drift" in figures) == (task == "words")
    assert not Path("report.json.partial").exists()


def test_an_interrupted_evaluation_resumes(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    batch, passes = Side._batch, []

    def interrupted(side: Side, rows: Any) -> Any:
        passes.append(len(rows))
        if len(passes) == 5:
            raise KeyboardInterrupt
        return batch(side, rows)

    monkeypatch.setattr(Side, "_batch", interrupted)
    assert cli.main(EVAL) == 130
    partial = Path("report.json.partial")
    assert len(partial.read_text().splitlines()) == 1 + 8
    partial.write_text(partial.read_text()[:-9])  # killed while it wrote
    assert not Path("report.json").exists()

    assert cli.main([*EVAL, "--limit", "2"]) == 2
    assert "report.json.partial holds results of an evaluation with another base" in capsys.readouterr().err

    passes[:] = [0] * 5
    assert cli.main(EVAL) == 0
    report = json.loads(Path("report.json").read_text())
    assert len({(i["task"], i["side"], i["item"]) for i in report["items"]}) == len(report["items"]) == 24
    assert sum(passes) == 24 - 7  # what was finished is not computed again
    assert not partial.exists()


def test_what_an_interruption_loses_without_a_file_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(Side, "_batch", Mock(side_effect=KeyboardInterrupt))
    for json_words, lost in ((["--json", "-"], True), (["--json", "report.json"], False)):
        assert cli.main([*EVAL[: EVAL.index("--json")], *json_words]) == 130
        err = capsys.readouterr().err
        assert ("Nothing was kept. With --json FILE" in err) == lost
        assert ("What is finished is in report.json.partial" in err) != lost


def test_progress_is_lines_without_a_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    assert cli.main(EVAL) == 0
    err = capsys.readouterr().err
    assert "\r" not in err
    lines = [line for line in err.splitlines() if line.startswith("words: ")]
    assert lines[-1] == "words: 12 of 12 items, side two"
    assert len(lines) > 3
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 60.0)
    assert cli.main([*EVAL, "--limit", "2"]) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("words: ")] == [
        "words: 6 of 6 items, side two"
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_programs_run_once_that_is_confirmed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = {"before": "'''", "after": "'''; assert {{right}}"}  # whatever the answer, it is a string
    Path("code.yaml").write_text(yaml.safe_dump(TASK | {"scorer": "code", "reference": reference}))
    words = ["eval", *BASE, "--task", "code.yaml", "--json", "report.json", "--confirm-run-unsafe-code"]
    assert cli.main(words) == 0
    scores = {item["item"]: item["score"] for item in json.loads(Path("report.json").read_text())["items"]}
    assert scores == {f"rows.jsonl:{n}": n % 2 for n in (1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", *BASE], "--task"),
        (["eval", *BASE, "--task", "gsm8k"], "The task file gsm8k cannot be read"),
        (["eval", *BASE, "--task", "words.yaml", "words.yaml"], "Two tasks are named 'words'"),
        (["eval", *BASE, "--task", "words.yaml", "--against", "one"], "--against one is no side; there are base"),
        (["eval", *BASE, "--task", "words.yaml", "code.yaml"], "Task code runs programs.*--confirm-run-unsafe-code"),
        (["eval", *BASE, "--task", "words.yaml", "--limit", "0"], "--limit.*'0'"),
        (["eval", *BASE, "--task", "words.yaml", "--adapter", "a=nowhere"], "nowhere: there is no such directory"),
        (["eval", *BASE, "--task", "words.yaml", "--json", "none/report.json"], "none/report.json"),
        (["eval", *BASE, "--task", "words.yaml", "--json", "."], r"\. is a folder; give --json the name of a file"),
    ],
)
def test_bad_input_is_one_sentence(folder: Path, words: list[str], message: str, capsys: Capture) -> None:
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("icarus: ")
    assert re.search(message, line)


def outcome(side: str, item: int, score: float, loss: float, tokens: int = 1) -> Outcome:
    values: dict[str, Any] = {"task": "t", "text": "", "generated_tokens": 0, "drift": None}
    return Outcome(**values, side=side, item=str(item), score=score, loss=loss, tokens=tokens)


def test_differences_are_paired() -> None:
    """Two sides that differ by the same on every item, however much the items differ."""
    rows = [outcome("a", n, n / 20, n, tokens=n + 1) for n in range(20)]
    rows += [outcome("b", n, n / 20 + 0.25, n - 0.5, tokens=n + 1) for n in reversed(range(20))]
    difference = summary(rows, {"a": "base", "b": "icarus"}, "a")["t"]["b"]["difference"]
    assert difference["score"] == {"value": pytest.approx(0.25), "interval": pytest.approx([0.25, 0.25])}
    assert difference["loss"] == {"value": pytest.approx(-0.5), "interval": pytest.approx([-0.5, -0.5])}


def test_an_interval_is_that_of_the_mean() -> None:
    draws = np.random.default_rng(3).normal(0.2, 1, 400)
    rows = [outcome(side, n, value * (side == "b"), 1.0) for side in "ab" for n, value in enumerate(draws)]
    difference = summary(rows, {"a": "base", "b": "icarus"}, "a")["t"]["b"]["difference"]["score"]
    half = 1.96 * draws.std() / 20
    assert difference["interval"] == pytest.approx([draws.mean() - half, draws.mean() + half], abs=0.02)
    one = summary(rows[::400], {"a": "base", "b": "icarus"}, "a")["t"]["b"]["difference"]["score"]
    assert one["interval"] is None
