"""Score the shipped specialists, and the base model beside them, on unseen rows of data.py.

    python experiments/wikisql_roles/score.py --data data/roles --adapters adapters --json results/specialists.json

Three sides answer behind the same context: the specialist, the base model, and the base model with three solved rows in
front, which is the fairer comparison for a model that was never told the form of an answer. Figures:

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
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from icarus import BASE, Batch, Specialists
from icarus.bench.measure import settings
from icarus.train.data import tokenize

SHOTS, BATCH = 3, 8
SIDES = ("specialist", "base", "base, three examples")
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


def batch_of(rows: list[Row], tokenizer: Any) -> Batch:
    """Token rows, padded on the right."""
    tokens = [tokenize(row, tokenizer, None) for row in rows]
    longest = max(len(t["input_ids"]) for t in tokens)

    def column(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([t[name] + [filler] * (longest - len(t[name])) for t in tokens])

    mask = torch.tensor([[1] * len(t["input_ids"]) + [0] * (longest - len(t["input_ids"])) for t in tokens])
    return Batch.of(column("input_ids", 0), column("labels", -100), mask)


@torch.no_grad()
def forced(team: Specialists, role: str, rows: list[Row], *, base: bool) -> dict[str, float]:
    """Loss and exact match by teacher forcing."""
    model: Any = team.model
    model.set_adapter(role)
    off: AbstractContextManager[Any] = model.disable_adapter() if base else nullcontext()
    loss, tokens, exact = 0.0, 0, 0
    with off:
        for start in range(0, len(rows), BATCH):
            total, logits, targets = team.streams.loss(batch_of(rows[start : start + BATCH], team.tokenizer))
            wanted = targets != -100
            loss, tokens = loss + float(total), tokens + int(wanted.sum())
            exact += int(((logits.argmax(-1) == targets) | ~wanted).all(1).sum())
    return {"loss": round(loss / tokens, 4), "exact match": round(exact / len(rows), 4)}


def token_f1(answer: str, wanted: str) -> float:
    """Harmonic mean of the precision and recall of words."""
    said, gold = (re.findall(r"[a-z0-9]+", text.lower()) for text in (answer, wanted))
    same = sum((Counter(said) & Counter(gold)).values())
    return 2 * same / (len(said) + len(gold)) if same else 0.0


def generated_f1(team: Specialists, model: str, rows: list[Row]) -> float:
    """Mean token F1 of greedy answers, cut off well behind the length of the reference."""
    scores = []
    for row in rows:
        wanted = row["completion"][0]["content"]
        limit = len(team.tokenizer(wanted)["input_ids"]) + 8
        said = team.context().append(row["prompt"]).generate(model, max_new_tokens=limit).text
        scores.append(token_f1(said, wanted))
    return round(statistics.mean(scores), 4)


def score(team: Specialists, role: str, rows: list[Row], train: list[Row], f1_rows: int) -> dict[str, Any]:
    """All figures of one role."""
    shown = with_examples(rows, train)
    figures: dict[str, Any] = {
        "specialist": forced(team, role, rows, base=False),
        "base": forced(team, role, rows, base=True),
        "base, three examples": forced(team, role, shown, base=True),
    }
    if role == "explainer":
        figures["specialist"]["token F1"] = generated_f1(team, role, rows[:f1_rows])
        figures["base"]["token F1"] = generated_f1(team, BASE, rows[:f1_rows])
        figures["base, three examples"]["token F1"] = generated_f1(team, BASE, shown[:f1_rows])
    return {"task": TASKS[role], "rows": len(rows), "f1_rows": f1_rows, **figures}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that data.py wrote")
    parser.add_argument("--adapters", type=Path, required=True, help="folder with one adapter folder a role")
    parser.add_argument("--rows", type=int, default=300, help="test rows a role (default: 300)")
    parser.add_argument("--f1-rows", type=int, default=60, help="of them answered in full for token F1 (default: 60)")
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    arguments = parser.parse_args()
    team = Specialists.load(specialists={role: arguments.adapters / role for role in TASKS})
    report: dict[str, Any] = {"settings": settings(base="smollm2-135m-instruct", dtype="float32")}
    for role in TASKS:
        rows = read_rows(arguments.data / f"{role}_test.jsonl")[: arguments.rows]
        train = read_rows(arguments.data / f"{role}_train.jsonl")
        report[role] = score(team, role, rows, train, arguments.f1_rows)
        print(role, json.dumps(report[role]), flush=True)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
