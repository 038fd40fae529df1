"""Training data for the agents of the demo: planner, sql and explainer, who take turns in one chat about tables.

Reads WikiSQL (BSD-3-Clause) in the form of github.com/jkkummerfeld/text2sql-data, unpacked to JSON lines:
wikisql_train.jsonl.gz and wikisql_test.jsonl.gz, one query a line, with the fields `table_id`, `question`, `sql`,
`columns` (the columns that any query on that table uses; the tables themselves are not in that repository) and `id`.
Writes {planner,sql,explainer}_{train,test}.jsonl, one {"prompt": [message, ...], "completion": [message]} a line, which
is TRL's conversational prompt/completion format. The roles share every context from the start:

    system     You query one table.
    user       Columns: downhill, overall, slalom, super_g
               Question: What was her highest Super G with a Slalom of 58 and an Overall larger than 2?
    assistant  max(super_g) where overall, slalom                                       <- planner
    user       Write the SQL.
    assistant  select max(super_g) from t where overall > 2 and slalom = 58             <- sql
    user       Columns: downhill, overall, slalom, super_g
               Query: select slalom from t where overall = 4
               What does it ask?
    assistant  Which Slalom has an Overall of 4?                                        <- explainer

Half of the training rows have an earlier round about another table in front, as a growing context has; test rows have
none. Queries are rewritten as valid SQL in lower case, with values spelled as in the question. Rows with a column that
is not a plain identifier, with quotes in a value, or with a value that the question does not hold, are left out. The
output depends on files, rows and seed only.
"""

import argparse
import dataclasses
import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

SYSTEM = "You query one table."
ASK_SQL = "Write the SQL."
ASK_MEANING = "What does it ask?"
ROLES = ("planner", "sql", "explainer")
EARLIER_ROUNDS = 0.5  # share of training rows with one
# Words that SQL reserves: as a bare column name they would make the query invalid.
RESERVED = frozenset(
    "all and as by case check create default end for from group in index is join key left like not null of on or order "
    "primary references right select set table then to transaction union unique update values when where".split()
)
IDENTIFIER = re.compile(r"[a-z_][a-z0-9_]*")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
QUERY = re.compile(r"SELECT (?:(MAX|MIN|COUNT|SUM|AVG) )?(\S+) FROM t WHERE (.*) ;")
BETWEEN_CONDITIONS = re.compile(r" AND (?=\S+ [=<>] )")
CONDITION = re.compile(r'(\S+) ([=<>]) (?:"([^"]*)"|(-?[\d.]+))')

Message = dict[str, str]
Row = dict[str, list[Message]]


@dataclasses.dataclass(frozen=True)
class Condition:
    """One comparison of a where clause; `value` is spelled as in the question, without quotes."""

    column: str
    operator: str
    value: str

    @property
    def is_number(self) -> bool:
        """Whether the value is written without quotes."""
        return NUMBER.fullmatch(self.value) is not None

    def sql(self) -> str:
        """The comparison in SQL."""
        return f"{self.column} {self.operator} {self.value if self.is_number else repr_sql(self.value)}"


@dataclasses.dataclass(frozen=True)
class Query:
    """A WikiSQL query: one column, perhaps aggregated, and conditions joined by `and`."""

    aggregate: str
    column: str
    conditions: tuple[Condition, ...]

    @property
    def selected(self) -> str:
        """The selected expression, such as `max(gold)` or `title`."""
        return f"{self.aggregate}({self.column})" if self.aggregate else self.column

    def sql(self) -> str:
        """The query in SQL."""
        return f"select {self.selected} from t where {' and '.join(c.sql() for c in self.conditions)}"

    def plan(self) -> str:
        """What the planner answers: the selected expression and the columns to filter by."""
        return f"{self.selected} where {', '.join(c.column for c in self.conditions)}"

    def columns(self) -> set[str]:
        """Every column that the query uses."""
        return {self.column, *(c.column for c in self.conditions)}


@dataclasses.dataclass(frozen=True)
class Example:
    """One question about one table, with its query."""

    table: str
    question: str
    columns: tuple[str, ...]
    query: Query


def repr_sql(text: str) -> str:
    """A text value as SQL writes it; values with quotes were left out when parsing."""
    return f"'{text}'"


def spelled_as_in(question: str, value: str) -> str | None:
    """The value as the question spells it, or None where the question does not hold it."""
    start = question.lower().find(value.lower())
    spelled = question[start : start + len(value)] if start >= 0 and value.strip() else ""
    return spelled if spelled.lower() == value.lower() and not set(spelled) & set("'\"") else None


def parse_condition(text: str, question: str) -> Condition | None:
    """One condition of a WikiSQL query, or None where it does not suit."""
    match = CONDITION.fullmatch(text)
    value = spelled_as_in(question, match[3] or match[4] or "") if match else None
    return Condition(match[1].lower(), match[2], value) if match and value else None


def parse_query(sql: str, question: str) -> Query | None:
    """A WikiSQL query, or None where any part of it does not suit."""
    match = QUERY.fullmatch(sql)
    if match is None:
        return None
    conditions = [parse_condition(text, question) for text in BETWEEN_CONDITIONS.split(match[3])]
    kept = tuple(c for c in conditions if c is not None)
    if len(kept) != len(conditions) or len({c.column for c in kept}) != len(kept):
        return None
    return Query((match[1] or "").lower(), match[2].lower(), kept)


def is_plain(column: str) -> bool:
    """Whether SQL takes this column name without quotes."""
    return IDENTIFIER.fullmatch(column) is not None and column not in RESERVED


def parse_example(line: str) -> Example | None:
    """One line of a WikiSQL file, or None where it is left out."""
    raw = json.loads(line)
    question = " ".join(raw["question"].split())
    columns = tuple(column.lower() for column in raw["columns"])
    query = parse_query(raw["sql"], question)
    if query is None or not all(map(is_plain, columns)) or not query.columns() <= set(columns):
        return None
    if not 3 <= len(columns) <= 7 or len(query.conditions) > 3 or len(question) > 120:
        return None
    return Example(raw["table_id"], question, columns, query)


def read_examples(path: Path, seed: int) -> list[Example]:
    """The examples of one file, in a seeded random order."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        examples = [example for example in map(parse_example, lines) if example is not None]
    random.Random(seed).shuffle(examples)
    return examples


def message(role: str, content: str) -> Message:
    """One chat message."""
    return {"role": role, "content": content}


def columns_of(example: Example) -> str:
    """The line that lists a table's columns."""
    return f"Columns: {', '.join(example.columns)}"


def turns_of(role: str, example: Example) -> list[Message]:
    """The messages of one round up to and with the turn of a role."""
    if role == "explainer":
        asked = f"{columns_of(example)}\nQuery: {example.query.sql()}\n{ASK_MEANING}"
        return [message("user", asked), message("assistant", example.question)]
    asked = f"{columns_of(example)}\nQuestion: {example.question}"
    turns = [message("user", asked), message("assistant", example.query.plan())]
    if role == "sql":
        turns += [message("user", ASK_SQL), message("assistant", example.query.sql())]
    return turns


def rows_of(role: str, examples: list[Example], earlier: float, seed: int) -> Iterator[Row]:
    """The rows of one role, one an example, in the order of the examples; a share of them with an earlier round."""
    rng = random.Random(f"{role} {seed}")
    for example in examples:
        turns = turns_of(role, example)
        if rng.random() < earlier:
            turns = turns_of(rng.choice(("sql", "sql", "explainer")), rng.choice(examples)) + turns
        yield {"prompt": [message("system", SYSTEM), *turns[:-1]], "completion": turns[-1:]}


def write_rows(path: Path, rows: Iterator[Row]) -> int:
    """Writes JSON lines; returns how many."""
    lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def write_all(wikisql: Path, output: Path, count: int | None, test_count: int, seed: int) -> None:
    """Writes the six files and prints the size of each."""
    train = read_examples(wikisql / "wikisql_train.jsonl.gz", seed)[:count]
    seen = {example.table for example in train}
    test = [e for e in read_examples(wikisql / "wikisql_test.jsonl.gz", seed) if e.table not in seen][:test_count]
    output.mkdir(parents=True, exist_ok=True)
    for part, examples, earlier in (("train", train, EARLIER_ROUNDS), ("test", test, 0.0)):
        for role in ROLES:
            path = output / f"{role}_{part}.jsonl"
            print(f"{path}: {write_rows(path, rows_of(role, examples, earlier, seed))} rows")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikisql", type=Path, required=True, help="folder with wikisql_{train,test}.jsonl.gz")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to; created if it does not exist")
    parser.add_argument("--rows", type=int, help="train rows a role (default: all that suit)")
    parser.add_argument("--test-rows", type=int, default=500, help="test rows a role (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the order and the earlier rounds (default: 0)")
    arguments = parser.parse_args()
    write_all(arguments.wikisql, arguments.output, arguments.rows, arguments.test_rows, arguments.seed)


if __name__ == "__main__":
    main()
