"""What stands on which side of a cut."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from experiments.accuracy import data


def _call(index: int, called: str, *offered: str) -> dict[str, Any]:
    return {
        "question": [[{"role": "user", "content": f"Question {index}"}]],
        "function": [{"name": name} for name in offered],
        "ground_truth": [{called: {"x": [index]}}],
        "category": "simple",
    }


def test_items_that_call_a_function_of_the_training_rows_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each row offers a set of functions of its own, so all are groups; every second one calls the same function.
    rows = [_call(n, "common" if n % 2 else f"own_{n}", "common", f"own_{n}") for n in range(40)]
    file = tmp_path / "function_calling" / "bfcl.jsonl.gz"
    file.parent.mkdir()
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    monkeypatch.setattr(data, "VALIDATION_ROWS", 4)
    made = data.parts("bfcl", tmp_path, "text", 300)
    calls_common = {item.name for item in made.test.items if '"common"' in item.row["completion"]}
    assert 0 < len(calls_common) < len(made.test.items) == 8
    assert made.seen == calls_common
