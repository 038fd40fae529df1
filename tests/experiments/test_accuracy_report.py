"""What the report of the accuracy experiment is made of."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.accuracy import report, work
from experiments.accuracy.plan import Cell


def test_items_that_are_left_out_count_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"item": "a b c", "score": "1 0 0.5", "loss": "2 4 6", "tokens": "1 2 3", "generated": "4 5 6"}
    found = {"items": columns | {"drift": "- 0.25 0.5"}}
    monkeypatch.setattr(work, "scores", lambda place, cell: found)
    place: Any = None
    kept = report._outcomes(place, Cell("bfcl", "icarus", 0.001, 0), frozenset({"a", "c"}))
    assert [(one.item, one.score, one.loss, one.tokens, one.generated_tokens, one.drift) for one in kept] == [
        ("b", 0.0, 4.0, 2, 5, 0.25)
    ]
