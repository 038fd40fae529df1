"""Results of an earlier version get this one's names, and no other figures."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import convert_results


def test_what_is_converted_keeps_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(name: str, value: Any) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(value))

    def read(name: str) -> Any:
        data = (tmp_path / name).read_bytes()
        return json.loads(gzip.decompress(data) if name.endswith("gz") else data)

    write("agents/report.json", {"runs": [{"system": "single", "p95": 0.5}], "gains": [{"over": "single"}]})
    write("agents/runs.jsonl", {"unit": {"system": "single"}, "duration": 1.25})
    write("demo.json", {"turns": [{"model": "sql", "reused_tokens": 7}], "icarus": {"seconds": 1.0}})
    ratio = {"what": "chain: icarus over stock", "value": 1.5, "starts": [1.5]}
    once = {"what": "chain: prompt tokens", "value": 9, "at_most": 9, "met": True}
    side = {"median": 3.0, "samples": [{"turns": []}]}
    goals = [{**ratio, "at_least": 10.0, "met": False}, once]
    write("serve-micro.json", {"goals": goals, "measurements": {"chain": {"unit": "s", "sides": {"icarus": side}}}})

    monkeypatch.setattr(convert_results, "RESULTS", tmp_path)
    convert_results.main()
    convert_results.main()  # again is nothing
    assert read("agents/report.json") == {"runs": [{"system": "base", "p95": 0.5}], "gains": [{"over": "base"}]}
    assert read("agents/runs.jsonl.gz") == {"unit": {"system": "base"}, "duration": 1.25}
    assert not (tmp_path / "agents" / "runs.jsonl").exists()
    assert read("demo.json") == {"turns": [{"model": "sql", "cached_tokens": 7}], "icarus": {"seconds": 1.0}}
    assert read("serve-micro.json") == {
        "measurements": {"chain": {"unit": "s", "sides": {"icarus": {"median": 3.0}}}},
        "ratios": [ratio],
    }
    assert read("serve-micro-samples.json.gz") == {"chain": {"icarus": [{"turns": []}]}}
