"""The programs in examples/ run as they stand, here on a tiny model. ``handover.py`` needs a server."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from icarus import adapter
from saved import save_base

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
