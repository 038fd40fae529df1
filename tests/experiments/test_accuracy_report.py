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


def test_what_was_not_run_is_said() -> None:
    def runs(*seeds: int) -> dict[str, Any]:
        run = {"validation_loss": 0.5, "tokens": 12_345, "cpu_seconds": 90, "peak_bytes": 2.5e9, "on": "CPU"}
        return {"rate": 0.001, "seeds": {str(seed): run for seed in seeds}}

    arms = {
        "base": {"seeds": {}},
        "conventional": runs(0, 1),
        "icarus": runs(0),
        "team": {"search": {"0.001": 0.7}, "rate": None, "seeds": {}},
        "team-time": {"search": {}, "rate": None, "seeds": {}},
    }
    rows = {
        line.split(" | ")[0].strip("| "): line.split(" | ") for line in report._table("plan", arms, (0, 1)).split("\n")
    }
    assert {name: cells[3] for name, cells in rows.items() if name in arms} == {
        "base": "",
        "conventional": "0.500; 0.500",
        "icarus": "0.500; seed 1 not run",
        "team": "search: 0.001: 0.7",
        "team-time": "not run",
    }
    arms["icarus"]["seeds"]["1"] = {"score": 0.25, **runs(1)["seeds"]["1"]}
    assert " | seed 0 not scored" not in report._table("plan", {"icarus": runs(0, 1)}, (0, 1))
    assert " | 25.0; seed 0 not scored | " in report._table("plan", arms, (0, 1))
    assert rows["conventional"][9:12] == ["12; 12", "1.5; 1.5", "2.5; 2.5"]


def test_who_wins_is_by_both_seeds() -> None:
    def arm(*intervals: tuple[float, float]) -> dict[str, Any]:
        return {
            "seeds": {
                str(n): {"difference": {"score": {"interval": [0, 1]}, "loss": {"interval": list(own)}}}
                for n, own in enumerate(intervals)
            }
        }

    report_of = {
        "one": {"team": arm((-0.3, -0.1), (-0.2, -0.1)), "icarus": arm((0.1, 0.2), (0.1, 0.3))},
        "two": {"team": arm((-0.3, -0.1), (-0.2, 0.1)), "icarus": arm((0.1, 0.2))},
        "three": {"team": arm((-0.3, -0.1), (-0.4, -0.1))},
    }
    rows = [line for line in report._wins(report_of).split("\n") if " | loss | " in line]
    assert rows == [
        "| team | conventional | loss | one, three |  | wins |",
        "| icarus | conventional | loss |  | one |  |",
    ]
