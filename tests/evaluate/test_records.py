"""Results of an evaluation that was killed at any byte are read again as far as they were written."""

from __future__ import annotations

from pathlib import Path

import pytest

from icarus.errors import InputError
from icarus.evaluate import Outcome
from icarus.evaluate.records import Records

IDENTITY = {"base": "abc", "tasks": ["words"]}


def _outcome(index: int) -> Outcome:
    return Outcome(
        task="words",
        side="base",
        item=f"words:{index}",
        score=1.0,
        loss=0.5,
        tokens=3,
        text="é\nü",
        generated_tokens=2,
        drift=None,
    )


def test_a_file_that_was_cut_anywhere_goes_on(tmp_path: Path) -> None:
    whole, report = tmp_path / "whole", tmp_path / "report.json"
    records = Records(whole, IDENTITY)
    for index in range(3):
        records.add(_outcome(index))
    content = (tmp_path / "whole.partial").read_bytes()
    for end in range(len(content) + 1):
        (tmp_path / "report.json.partial").write_bytes(content[:end])
        first = Records(report, IDENTITY)
        assert len(first.outcomes) == max(content[:end].count(b"\n") - 1, 0)
        first.add(_outcome(7))
        again = Records(report, IDENTITY)
        assert again.outcomes == first.outcomes


@pytest.mark.parametrize("content", ["notes\n", "notes", '{"evaluation": {"base": "x"}}\n'])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json.partial").write_text(content)
    with pytest.raises(InputError, match=r"report.json.partial holds results of an evaluation with another"):
        Records(tmp_path / "report.json", IDENTITY)
    assert (tmp_path / "report.json.partial").read_text() == content
