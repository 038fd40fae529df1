"""Rows of WikiSQL's dev split that the folder of data sets lacks, in its form.

Reads ``data/wikisql.json.bz2`` of github.com/jkkummerfeld/text2sql-data (commit 5050bad), from which that folder's
rows were drawn, and writes a folder of links to it that has these rows as well::

    python -m experiments.accuracy.more_rows wikisql.json.bz2 --data DATA OUTPUT
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.accuracy.data import Row, lines

_FIELD = re.compile(r"TABLEalias\d\.(\S+)_FIELD\b")
_PARTS = ("train", "dev", "test")


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(prog="python -m experiments.accuracy.more_rows", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    options = parser.parse_args()
    files = [options.data / f"text_to_sql/wikisql_{part}.jsonl.gz" for part in _PARTS]
    known = {row["id"]: row for file in files for row in lines(file)}
    questions = {row["question"] for row in known.values()}
    with bz2.open(options.source, "rt", encoding="utf-8") as source:
        found = list(rows(json.load(source)))
    same = sum(row == known[row["id"]] for row in found if row["id"] in known)
    made = [r for r in found if r["split"] == "dev" and r["id"] not in known and r["question"] not in questions]
    _link(options.data, options.output)
    with gzip.open(options.output / "text_to_sql/wikisql_dev_rest.jsonl.gz", "wt", encoding="utf-8") as output:
        output.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
    print(f"{len(made)} rows; of the {len(known)} that {options.data} has, {same} come out the same")


def rows(entries: list[Any]) -> Iterator[Row]:
    """The rows of all splits, numbered in the order of the source."""
    sentences = [(entry["sql"][0], sentence) for entry in entries for sentence in entry["sentences"]]
    columns: dict[str, set[str]] = defaultdict(set)
    for sql, sentence in sentences:
        columns[sentence["table-id"]].update(_FIELD.findall(sql))
    for number, (sql, sentence) in enumerate(sentences):
        yield {
            "id": f"wikisql-{number}",
            "split": sentence["question-split"],
            "table_id": sentence["table-id"],
            "question": sentence["original"].strip(),
            "sql": _filled(sql, sentence["variables"]),
            "columns": sorted(columns[sentence["table-id"]]),
        }


def _filled(sql: str, variables: dict[str, str]) -> str:
    """Without aliases, with the variables' values: numbers as they are, all else in quotes."""
    sql = re.sub(r"(\S+)_FIELD\b", r"\1", sql.replace("TABLE AS TABLEalias0", "t").replace("TABLEalias0.", ""))
    for name, value in variables.items():
        quoted = value if re.fullmatch(r"-?\d+(\.\d+)?", value) else f'"{value.strip(chr(34))}"'
        sql = sql.replace(f'"{name}"', f'"{value}"').replace(f" {name} ", f" {quoted} ")
    return sql


def _link(data: Path, output: Path) -> None:
    for file in data.resolve().rglob("*.gz"):
        link = output / file.relative_to(data.resolve())
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(file)


if __name__ == "__main__":
    main()
