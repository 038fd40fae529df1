"""Results of icarus 0.1.0 as this version has them; no figure is changed.

    python -m benchmarks.convert_results

* The system ``single`` of ``icarus bench agents`` is called ``base``, as in all other results.
* Turns of ``demo.json`` have ``cached_tokens``, which were called ``reused_tokens``.
* Raw runs are compressed, and JSON is indented.
* ``serve-micro.json`` has ratios without the goals that they were held against; samples stand in a file of their own.

Reports and plots are then made again from the raw runs by ``icarus bench agents --redraw``.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from benchmarks.serve_micro.report import write

RESULTS = Path(__file__).resolve().parent.parent / "results"
GOALS = {"at_least", "at_most", "met"}


def renamed(value: Any) -> Any:
    """``single`` as the name of a system, wherever it stands."""
    if isinstance(value, dict):
        return {key: renamed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [renamed(inner) for inner in value]
    return "base" if value == "single" else value


def convert_agents(folder: Path) -> None:
    """Raw runs and report of one ``--output``."""
    for file in folder.glob("*.jsonl"):
        lines = [json.dumps(renamed(json.loads(line))) for line in file.read_text(encoding="utf-8").splitlines()]
        packed = gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0)
        file.with_name(file.name + ".gz").write_bytes(packed)
        file.unlink()
    _rewrite(folder / "report.json", renamed)


def convert_demo(file: Path) -> None:
    """Turns as ``icarus demo`` reports them."""
    report = json.loads(file.read_text(encoding="utf-8"))
    names = {"reused_tokens": "cached_tokens"}
    report["turns"] = [{names.get(key, key): value for key, value in turn.items()} for turn in report["turns"]]
    file.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def convert_serve_micro(file: Path) -> None:
    """Goals as ratios (how often a prompt is prefilled stands with the chain), and samples apart."""
    report = json.loads(file.read_text(encoding="utf-8"))
    if "goals" not in report:
        return
    goals = [goal for goal in report.pop("goals") if "starts" in goal]
    report["ratios"] = [{key: value for key, value in goal.items() if key not in GOALS} for goal in goals]
    report["samples"] = {
        name: {side: figures.pop("samples") for side, figures in table["sides"].items()}
        for name, table in report["measurements"].items()
    }
    write(report, file)


def _rewrite(file: Path, change: Any) -> None:
    report = change(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Convert all results; what is converted already stays as it is."""
    for file in RESULTS.glob("agents*/report.json"):
        convert_agents(file.parent)
    convert_demo(RESULTS / "demo.json")
    convert_serve_micro(RESULTS / "serve-micro.json")


if __name__ == "__main__":
    main()
