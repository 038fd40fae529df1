"""Score the shipped specialists, and the base model beside them, on unseen rows of wikisql_roles.py.

    python recipes/score_roles.py --data data/roles --adapters adapters --rows 150 --json results/specialists.json

Each row is answered greedily behind the same context: by the specialist, by the base model as it is (the row alone),
and by the base model with three solved training rows in front, which is the fairer comparison. The two answers behind
the row alone share one encoded context. Measures: planner and sql the share of answers equal to the reference in every
character; explainer the mean token F1 with the human question (SQuAD's measure: lower case, no punctuation).
"""

import argparse
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from icarus import BASE, Context, Specialists
from icarus.bench.measure import settings
from rich.progress import track

SHOTS = 3
TASKS = {
    "planner": "names the columns that a question needs",
    "sql": "writes the query from question and plan",
    "explainer": "says what a query asks",
}

Row = dict[str, list[dict[str, str]]]


def exact(answer: str, wanted: str) -> float:
    """1 if equal."""
    return float(answer.strip() == wanted)


def token_f1(answer: str, wanted: str) -> float:
    """Harmonic mean of the precision and recall of words."""
    found, gold = (re.findall(r"[a-z0-9]+", text.lower()) for text in (answer, wanted))
    same = sum((Counter(found) & Counter(gold)).values())
    return 2 * same / (len(found) + len(gold)) if same else 0.0


MEASURES: dict[str, tuple[str, Callable[[str, str], float]]] = {
    "planner": ("exact match", exact),
    "sql": ("exact match", exact),
    "explainer": ("token F1", token_f1),
}


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def shots_of(rows: list[Row]) -> list[dict[str, str]]:
    """A conversation of solved rows, without earlier rounds."""
    short = sorted(rows[:40], key=lambda row: len(row["prompt"]))[:SHOTS]
    system, bodies = short[0]["prompt"][0], [row["prompt"][1:] + row["completion"] for row in short]
    return [system, *(message for body in bodies for message in body)]


def answer(context: Context, model: str, wanted: str) -> str:
    """A greedy answer, cut off well behind the length of the reference."""
    limit = len(context.team.tokenizer(wanted)["input_ids"]) + 8
    return context.generate(model, max_new_tokens=limit).text


def score(team: Specialists, role: str, rows: list[Row], shots: list[dict[str, str]]) -> dict[str, Any]:
    """Mean scores of one role's specialist and of the base model, and all answers."""
    measure_name, measured = MEASURES[role]
    warm = team.context().append(shots)
    records = []
    for row in track(rows, description=role):
        wanted = row["completion"][0]["content"]
        alone = team.context().append(row["prompt"])
        answers = {
            "specialist": answer(alone.fork(), role, wanted),
            "base": answer(alone, BASE, wanted),
            "base_three_shot": answer(warm.fork().append(row["prompt"][1:]), BASE, wanted),
        }
        scores = {name: measured(text, wanted) for name, text in answers.items()}
        records.append({"prompt": row["prompt"][-1]["content"], "wanted": wanted, "answers": answers, "scores": scores})
    means = {name: round(statistics.mean(r["scores"][name] for r in records), 4) for name in records[0]["scores"]}
    return {"task": TASKS[role], "measure": measure_name, "rows": len(rows), **means, "records": records}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that wikisql_roles.py wrote")
    parser.add_argument("--adapters", type=Path, required=True, help="folder with one adapter folder a role")
    parser.add_argument("--rows", type=int, default=150, help="test rows a role (default: 150)")
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    arguments = parser.parse_args()
    team = Specialists.load(specialists={role: arguments.adapters / role for role in TASKS})
    report: dict[str, Any] = {"settings": settings(base="smollm2-135m-instruct", rows=arguments.rows)}
    for role in TASKS:
        rows = read_rows(arguments.data / f"{role}_test.jsonl")[: arguments.rows]
        report[role] = score(team, role, rows, shots_of(read_rows(arguments.data / f"{role}_train.jsonl")))
        print(role, {k: v for k, v in report[role].items() if k != "records"}, flush=True)
    arguments.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
