"""Adapters of the same roles on two base models, over the same unseen rows of data.py.

    python -m experiments.wikisql_roles.compare --data data/roles --json results/specialists-compared.json \
        --before smollm2-135m-instruct=OLD --after smollm2-135m-wikisql=src/icarus/shipped

A side is a base model and a folder with one adapter folder a role; OLD are the earlier shipped ones, which
``git archive 915dda4 src/icarus/shipped`` has. Loss in nats per token of the reference, and the share of rows whose
greedy answer is the reference (score.py); 95 % intervals of the differences by paired bootstrap over rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from experiments.wikisql_roles.score import BATCH, TASKS, read_rows
from icarus import arguments
from icarus.bench.measure import settings
from icarus.evaluate import Sides, TokenRow
from icarus.evaluate.report import difference
from icarus.train.data import tokenize


def scored(side: str, role: str, rows: list[Any], dtype: str) -> tuple[Any, Any, Any]:
    """Of each row: loss, number of tokens, and whether it is right."""
    base, folder = side.split("=", 1)
    sides = Sides.load(base, {role: Path(folder) / role}, dtype=dtype)
    columns = [tokenize(row, sides.codec, None) for row in rows]
    tokens = [TokenRow(each["input_ids"], each["labels"]) for each in columns]
    with sides.side(role) as model:
        found = [one for start in range(0, len(tokens), BATCH) for one in model.score(tokens[start : start + BATCH])]
    losses = np.array([-sum(one.log_probabilities) for one in found])
    counts = np.array([float(len(one.log_probabilities)) for one in found])
    return losses, counts, np.array([float(one.greedy) for one in found])


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that data.py wrote")
    parser.add_argument("--before", required=True, metavar="BASE=FOLDER")
    parser.add_argument("--after", required=True, metavar="BASE=FOLDER")
    parser.add_argument("--rows", type=int, default=300, help="test rows a role (default: 300)")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="default: %(default)s")
    parser.add_argument("--json", required=True, metavar="FILE", help="file to write")
    options = parser.parse_args()
    before, after = options.before, options.after
    report: dict[str, Any] = {"settings": settings(before=before, after=after, dtype=options.dtype)}
    for role in TASKS:
        rows = read_rows(options.data / f"{role}_test.jsonl")[: options.rows]
        (loss, counts, right), (its_loss, _, its_right) = (
            scored(side, role, rows, options.dtype) for side in (before, after)
        )
        ones = np.ones(len(rows))
        report[role] = {
            "rows": len(rows),
            "loss": {"before": loss.sum() / counts.sum(), "after": its_loss.sum() / counts.sum()}
            | difference(its_loss - loss, counts),
            "right": {"before": right.mean(), "after": its_right.mean()} | difference(its_right - right, ones),
        }
    arguments.write_json(report, options.json)


if __name__ == "__main__":
    main()
