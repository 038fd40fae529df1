"""The tasks: rows to train on, rows for the choice of settings, items to score.

Reads JSON lines (gzip), one object a row; files and folders are named in ``SOURCES``. They were made from these
repositories on GitHub:

    WikiSQL                      jkkummerfeld/text2sql-data
    OpenBookQA, CommonsenseQA    AGI-Edgerunners/LLM-Adapters and kojima-takeshi188/zero_shot_cot
    MAWPS                        AGI-Edgerunners/LLM-Adapters
    GSM8K                        openai/grade-school-math
    BFCL                         ShishirPatil/gorilla
    agent roles                  hjeon2k/LRAgent, from AutoAct

Rows that settings are chosen by are cut from the training part; rows of one table, question or set of functions never
stand on both sides of a cut. (One function may be in several sets.)
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from icarus.errors import InputError
from icarus.evaluate import Item, Task

Form = Literal["chat", "text"]
Row = dict[str, Any]

VALIDATION_ROWS = 128
_ANSWERS = re.compile(r"Answer\d: (.*?)(?= Answer\d: |\n\nAnswer format|$)", re.DOTALL)


@dataclass(frozen=True)
class Example:
    """A question and its answer, before a model's form is put around them."""

    group: str
    """What must not stand on both sides of a cut."""
    question: str
    answer: str
    reference: Any
    """What the scorer compares with; of choices, the index of the right one."""
    choices: tuple[str, ...] = ()
    calls: frozenset[str] = frozenset()
    """The functions that the answer calls. Other groups may call them, too."""


@dataclass(frozen=True)
class Source:
    """Where a task comes from and how its answers are scored."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    """Empty: a fifth of the groups of ``train``."""
    example: Callable[[Row], Example | None]
    scorer: str
    max_new_tokens: int = 0


@dataclass(frozen=True)
class Parts:
    """A task in the form of one model."""

    train: list[Row]
    validation: list[Row]
    test: Task
    seen: frozenset[str]
    """Names of the items whose answers call a function that an answer to train on calls."""


def lines(file: Path) -> Iterable[Row]:
    """The rows of a file.

    Raises:
        InputError: there is no such file.
    """
    if not file.exists():
        raise InputError(f"{file} is missing; give the folder of the data sets as --data.")
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        yield from map(json.loads, opened)


def _wikisql(row: Row) -> Example:
    question = f"Table t has the columns {', '.join(row['columns'])}.\nWrite SQL for: {row['question']}"
    return Example(row["table_id"], question, row["sql"], row["sql"])


def _gsm8k(row: Row) -> Example:
    answer = re.sub(r"<<.*?>>", "", row["answer"])  # marks for a calculator
    return Example(row["question"], row["question"], answer, row["answer"])


def _mawps(row: Row) -> Example | None:
    """A short problem; its answer is the equation solved for x, and the number to six digits."""
    found = re.fullmatch(r"[xX]=(.+)", row["equation"])
    if not found:
        return None
    equation = re.sub(r"(\d)\.0\b", r"\1", found[1])
    same_but_for_numbers = re.sub(r"[\d.,\s]+", "#", row["question"].lower())
    answer = f"{equation}\n#### {float(row['answer']):g}"
    return Example(same_but_for_numbers, row["question"], answer, answer)


def _commonsenseqa(row: Row) -> Example:
    choices = tuple(row["choices"].values())
    right = list(row["choices"]).index(row["answer"])
    return Example(row["question"], _with_choices(row["question"], choices), choices[right], right, choices)


def _openbookqa(row: Row) -> Example | None:
    question = row["instruction"].split("question: ", 1)[1].split("\n\nAnswer1:")[0]
    choices = tuple(part.strip() for part in _ANSWERS.findall(row["instruction"]))
    right = int(row["answer"].removeprefix("answer")) - 1
    if len(choices) != 4 or len(set(choices)) != 4 or not all(choices):
        return None
    return Example(question, _with_choices(question, choices), choices[right], right, choices)


def _with_choices(question: str, choices: Sequence[str]) -> str:
    return f"{question}\nChoose: {'; '.join(choices)}."


def _bfcl(row: Row) -> Example | None:
    if not row["ground_truth"] or row["category"].startswith("multi_turn"):
        return None
    turns = row["question"][0]
    if len(turns) != 1 or len(json.dumps(row["function"])) > 3000:
        return None
    calls = [
        {"name": name, "arguments": _allowed(wanted)} for call in row["ground_truth"] for name, wanted in call.items()
    ]
    question = f"Functions: {json.dumps(row['function'])}\nAnswer with a JSON list of calls.\n{turns[0]['content']}"
    group = json.dumps(sorted(function["name"] for function in row["function"]))
    called = frozenset(str(call["name"]) for call in calls)
    return Example(group, question, json.dumps(calls), row["ground_truth"], calls=called)


def _allowed(wanted: Row) -> Row:
    """The first allowed value of each argument; an argument that may be left out is."""
    return {name: _first(values) for name, values in wanted.items() if "" not in values}


def _first(values: Any) -> Any:
    """Allowed values are lists, and so are those of the fields of an allowed object."""
    value = values[0] if isinstance(values, list) and values else values
    return {key: _first(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _role(row: Row) -> Example:
    return Example(row["question"], row["input"], row["output"], row["output"])


SOURCES = {
    "wikisql": Source(("text_to_sql/wikisql_train",), ("text_to_sql/wikisql_test",), _wikisql, "sql", 96),
    "wikisql-more": Source(("text_to_sql/wikisql_train",), ("text_to_sql/wikisql_dev_rest",), _wikisql, "sql", 96),
    "commonsenseqa": Source(
        ("multiple_choice/commonsenseqa_train",), ("multiple_choice/commonsenseqa_dev",), _commonsenseqa, "choice"
    ),
    "openbookqa": Source(
        ("multiple_choice/openbookqa_train",), ("multiple_choice/openbookqa_test",), _openbookqa, "choice"
    ),
    "gsm8k": Source(("gsm8k/train",), ("gsm8k/test",), _gsm8k, "number", 256),
    "mawps": Source(("math_word_problems/mawps_train",), (), _mawps, "number", 48),
    "bfcl": Source(("function_calling/bfcl",), (), _bfcl, "function_call", 128),
    "plan": Source(("agent_roles/hotpotqa_plan", "agent_roles/scienceqa_plan"), (), _role, "exact_match", 64),
    "action": Source(("agent_roles/hotpotqa_action", "agent_roles/scienceqa_action"), (), _role, "exact_match", 48),
}


def parts(task: str, folder: Path, form: Form, test_items: int) -> Parts:
    """The rows of a task, in an order that depends on nothing but the files.

    Raises:
        InputError: there is no such task, or a file is missing.
    """
    if task not in SOURCES:
        raise InputError(f"There is no task {task!r}; there are {', '.join(SOURCES)}.")
    source = SOURCES[task]
    examples = _examples(source.train, folder, source.example)
    if source.test:
        test = _examples(source.test, folder, source.example)
    else:
        test, examples = _cut(examples, len(examples) // 5)
    held = {example.group for example in test}
    examples = [example for example in examples if example.group not in held]
    validation, train = _cut(examples, VALIDATION_ROWS)
    asked = {f"{task}-{index}": example for index, example in enumerate(test[:test_items])}
    items = [_item(name, example, form) for name, example in asked.items()]
    called = {function for example in train for function in example.calls}
    return Parts(
        [_row(example, form) for example in train],
        [_row(example, form) for example in validation],
        Task(name=task, items=items, scorer=source.scorer, max_new_tokens=source.max_new_tokens or 1),
        frozenset(name for name, example in asked.items() if example.calls & called),
    )


def _examples(files: Sequence[str], folder: Path, make: Callable[[Row], Example | None]) -> list[Example]:
    made = [make(row) for file in files for row in lines(folder / f"{file}.jsonl.gz")]
    examples = [example for example in made if example is not None]
    random.Random(0).shuffle(examples)
    return examples


def _cut(examples: Sequence[Example], count: int) -> tuple[list[Example], list[Example]]:
    """About ``count`` examples, in whole groups by their first appearance, and those of all other groups."""
    sizes = Counter(example.group for example in examples)
    taken, held = 0, set[str]()
    for group, size in sizes.items():
        if taken >= count:
            break
        taken += size
        held.add(group)
    cut = [example for example in examples if example.group in held]
    return cut[:count], [example for example in examples if example.group not in held]


def _row(example: Example, form: Form) -> Row:
    return {"prompt": _prompt(example.question, form), "completion": _completion(example.answer, form)}


def _item(name: str, example: Example, form: Form) -> Item:
    if not example.choices:
        return Item(name=name, row=_row(example, form), reference=example.reference)
    completions = [_completion(choice, form) for choice in example.choices]
    row = {"prompt": _prompt(example.question, form), "completions": completions}
    return Item(name=name, row=row, reference=example.reference)


def _prompt(question: str, form: Form) -> Any:
    return [{"role": "user", "content": question}] if form == "chat" else f"{question}\nAnswer:"


def _completion(answer: str, form: Form) -> Any:
    return [{"role": "assistant", "content": answer}] if form == "chat" else f" {answer}"
