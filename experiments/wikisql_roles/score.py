"""Score the shipped specialists, and base models beside them, on unseen rows of data.py.

    python experiments/wikisql_roles/score.py --data data/roles --dtype bfloat16 --json results/specialists.json

Four sides answer behind the same context: the specialist; the prepared base model that it decodes on; the packaged base
model, which was never told the form of an answer; and that with three solved rows in front. Figures:

    loss          nats per token of the reference
    exact match   share of rows whose greedy answer is the reference, end token included. Greedy decoding gives the
                  reference if and only if each of its tokens is the most likely one behind the right ones before it,
                  so one teacher-forced pass tells.
    token F1      explainer only, whose task has many right answers: words shared by the greedy answer and the human
                  question (SQuAD's measure)
"""

import argparse
import json
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from icarus import BASE, PACKAGED, PREPARED, arguments, shipped
from icarus.bench.measure import settings
from icarus.evaluate import Sides, TokenRow
from icarus.streams import IGNORED
from icarus.train.data import tokenize

SHOTS, BATCH = 3, 8
TASKS = {
    "planner": "question -> columns",
    "sql": "question, plan -> SQL",
    "explainer": "SQL -> question",
}

Message = dict[str, str]
Row = dict[str, list[Message]]


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def with_examples(rows: list[Row], train: list[Row]) -> list[Row]:
    """The rows with solved training rows in front, the shortest of the first forty."""
    short = sorted(train[:40], key=lambda row: len(row["prompt"]))[:SHOTS]
    shots = [message for row in short for message in row["prompt"][1:] + row["completion"]]
    return [{**row, "prompt": [row["prompt"][0], *shots, *row["prompt"][1:]]} for row in rows]


def token_f1(answer: str, wanted: str) -> float:
    """Harmonic mean of the precision and recall of words."""
    said, gold = (re.findall(r"[a-z0-9]+", text.lower()) for text in (answer, wanted))
    same = sum((Counter(said) & Counter(gold)).values())
    return 2 * same / (len(said) + len(gold)) if same else 0.0


def figures(sides: Sides, name: str, rows: list[Row], f1_rows: int) -> dict[str, float]:
    """Loss and exact match by teacher forcing of all rows, and token F1 of the first ones, if there are any."""
    asked = [tokenize(row, sides.codec, None) for row in rows]
    tokens = [TokenRow(columns["input_ids"], columns["labels"]) for columns in asked]
    with sides.side(name) as side:
        found = [one for start in range(0, len(tokens), BATCH) for one in side.score(tokens[start : start + BATCH])]
        losses = [-value for one in found for value in one.log_probabilities]
        report = {
            "loss": round(statistics.mean(losses), 4),
            "exact match": round(statistics.mean(one.greedy for one in found), 4),
        }
        scores = []
        for row, columns in zip(rows[:f1_rows], asked, strict=False):
            start = next(place for place, label in enumerate(columns["labels"]) if label != IGNORED)
            limit = len(columns["input_ids"]) - start + 8  # well behind the reference
            said = side.generate([columns["input_ids"][:start]], max_new_tokens=limit)[0].text
            scores.append(token_f1(said, row["completion"][0]["content"]))
    return report | ({"token F1": round(statistics.mean(scores), 4)} if scores else {})


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that data.py wrote")
    parser.add_argument(
        "--adapters", type=Path, help="folder with one adapter folder a role (default: the shipped ones)"
    )
    parser.add_argument("--base", default=PREPARED, help="that they decode on (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=200, help="test rows a role (default: 200)")
    parser.add_argument("--f1-rows", type=int, default=50, help="of them answered in full for token F1 (default: 50)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="default: %(default)s")
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    options = parser.parse_args()
    folders = {role: options.adapters / role for role in TASKS} if options.adapters else shipped()
    dtype = options.dtype
    prepared, packaged = Sides.load(options.base, folders, dtype=dtype), Sides.load(PACKAGED, dtype=dtype)
    report: dict[str, Any] = {"settings": settings(base=options.base, dtype=dtype)}
    for role, task in TASKS.items():
        rows = read_rows(options.data / f"{role}_test.jsonl")[: options.rows]
        shown = with_examples(rows, read_rows(options.data / f"{role}_train.jsonl"))
        f1_rows = options.f1_rows if role == "explainer" else 0
        report[role] = {"task": task, "rows": len(rows)} | ({"f1_rows": f1_rows} if f1_rows else {})
        report[role] |= {
            "specialist": figures(prepared, role, rows, f1_rows),
            "prepared base": figures(prepared, BASE, rows, f1_rows),
            "packaged model": figures(packaged, BASE, rows, f1_rows),
            "packaged model, three examples": figures(packaged, BASE, shown, f1_rows),
        }
        print(role, json.dumps(report[role]), flush=True)
    arguments.write_json(report, str(options.json))


if __name__ == "__main__":
    main()
