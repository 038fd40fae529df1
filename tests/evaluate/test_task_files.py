"""Tasks as YAML: what becomes of rows, and what is said of files that are wrong."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import yaml

from icarus.errors import DataError, InputError
from icarus.evaluate import Task, read_task
from saved import save_rows

ROWS = [
    {"question": "2 + 2?", "answer": "It is 4.\n#### 4", "wrong": ["5", "6"], "right": "4", "call": {"f": {"x": [1]}}},
    {"question": "3 + 3?", "answer": "It is 6.\n#### 6", "wrong": ["5", "7"], "right": "6", "call": {"f": {"x": [2]}}},
    {"question": "4 + 4?", "answer": "It is 8.\n#### 8", "wrong": ["5", "9"], "right": "8", "call": {"f": {"x": [3]}}},
]
PLAIN = {"data": "rows.jsonl", "prompt": "Q: {{question}}\nA: ", "completion": "{{answer}}", "scorer": "number"}
CHAT = {**PLAIN, "prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": "{{question}}"}]}
CHOICE = {
    **{key: PLAIN[key] for key in ("data", "prompt")},
    "choices": "{{wrong + [right]}}",
    "answer": "{{right}}",
    "scorer": "choice",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_rows(tmp_path / "rows.jsonl", *ROWS)
    return tmp_path


def task(folder: Path, values: Any, **options: Any) -> Task:
    (folder / "sums.yaml").write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return read_task(folder / "sums.yaml", **options)


def test_texts(folder: Path) -> None:
    made = task(folder, PLAIN | {"stop": ["\nQ:"], "max_new_tokens": 9})
    assert (made.name, made.scorer, made.stop, made.max_new_tokens) == ("sums", "number", ("\nQ:",), 9)
    assert [item.name for item in made.items] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]
    first = made.items[0]
    assert (first.row["prompt"], first.row["completion"]) == ("Q: 2 + 2?\nA: ", ROWS[0]["answer"])
    assert first.reference == ROWS[0]["answer"]
    assert len(task(folder, PLAIN, limit=2).items) == 2


def test_chats(folder: Path) -> None:
    first = task(folder, CHAT | {"name": "chat"}).items[0]
    assert first.row["prompt"] == [{"role": "system", "content": "Add."}, {"role": "user", "content": "2 + 2?"}]
    assert first.row["completion"] == [{"role": "assistant", "content": ROWS[0]["answer"]}]
    assert first.reference == ROWS[0]["answer"]


def test_an_expression_alone_keeps_its_kind(folder: Path) -> None:
    made = task(
        folder, PLAIN | {"scorer": "function_call", "reference": "{{ [call] }}", "tools": "{{[{'name': 'f'}]}}"}
    )
    assert made.items[1].reference == [{"f": {"x": [2]}}]
    assert made.items[1].row["tools"] == [{"name": "f"}]
    messages = [{"role": "user", "content": "hi"}]
    save_rows(folder / "rows.jsonl", {"messages": messages, "answer": 5})
    first = task(folder, PLAIN | {"prompt": "{{messages}}"}).items[0]
    assert (first.row["prompt"], first.reference) == (messages, "5")


@pytest.mark.parametrize("answer", ["{{right}}", "{{wrong | length}}", "2"])
def test_choices(folder: Path, answer: str) -> None:
    first, second, _ = task(folder, CHOICE | {"answer": answer}).items
    assert (first.row["completions"], first.reference) == (["5", "6", "4"], 2)
    assert second.row["completions"][second.reference] == "6"
    chat = task(folder, CHOICE | {"prompt": CHAT["prompt"], "answer": answer}).items[0]
    assert chat.row["completions"][chat.reference] == [{"role": "assistant", "content": "4"}]


def test_examples_stand_before_the_question_and_are_not_asked(folder: Path) -> None:
    made = task(folder, PLAIN | {"few_shot": {"count": 2}})
    assert [item.name for item in made.items] == ["rows.jsonl:3"]
    solved = "".join(f"Q: {row['question']}\nA: {row['answer']}\n\n" for row in ROWS[:2])
    assert made.items[0].row["prompt"] == f"{solved}Q: 4 + 4?\nA: "
    save_rows(folder / "train.jsonl", ROWS[2])
    chat = task(folder, CHAT | {"few_shot": {"count": 1, "data": "train.jsonl"}}).items[0]
    assert [m["role"] for m in chat.row["prompt"]] == ["system", "user", "assistant", "user"]
    assert [m["content"] for m in chat.row["prompt"][1:]] == ["4 + 4?", ROWS[2]["answer"], "2 + 2?"]
    choice = task(folder, CHOICE | {"few_shot": {"count": 1, "separator": "|"}}).items[0]
    assert choice.row["prompt"] == "Q: 2 + 2?\nA: 4|Q: 3 + 3?\nA: "


def test_examples_of_the_same_file_are_not_asked(folder: Path) -> None:
    for name in ("rows.jsonl", str(folder / "rows.jsonl"), f"../{folder.name}/rows.jsonl"):
        made = task(folder, PLAIN | {"few_shot": {"count": 2, "data": name}})
        assert [item.name for item in made.items] == ["rows.jsonl:3"]


def test_examples_are_of_the_questions_kind(folder: Path) -> None:
    chat, text = {"prompt": [{"role": "user", "content": "Q"}], "a": "#### 1"}, {"prompt": "Q", "a": "#### 2"}
    for rows in ((chat, text), (text, chat)):
        save_rows(folder / "rows.jsonl", *rows)
        with pytest.raises(DataError, match=r"rows.jsonl:2: .*one is a chat and another a text"):
            task(folder, PLAIN | {"prompt": "{{prompt}}", "completion": "{{a}}", "few_shot": {"count": 1}})


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (" {{number}}", " 5"),
        ("{{number}}\n", "5\n"),
        ("{{number}}", "5"),
        ("{{- number -}}", "5"),
        (" {{- number }}", "5"),
        ("{{ -number }}", "-5"),
        (" {{word}}", " five"),
    ],
)
def test_white_space_around_an_expression_is_kept(folder: Path, template: str, text: str) -> None:
    save_rows(folder / "rows.jsonl", {"number": 5, "word": "five"})
    made = task(folder, {"data": "rows.jsonl", "prompt": "Q", "completion": template, "scorer": "exact_match"})
    assert made.items[0].row["completion"] == text
    choices = task(folder, CHOICE | {"prompt": "Q", "choices": [template, "6"], "answer": "{{ 0 }}\n"})
    assert choices.items[0].row["completions"] == [text, "6"]


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        ([" yes", " no"], " no"),
        ([" yes", " no"], "no"),
        (["{{yes}}", " {{no}}"], "{{no}}"),
        ([" ({{yes}})", " ({{no}})"], " ({{no}})"),
        (["no", " no"], " no"),
        (["yes", "no"], "1\n"),
        (["yes", "no"], "{{ 1 }}\n"),
    ],
)
def test_the_right_choice_by_its_text(folder: Path, choices: list[str], answer: str) -> None:
    save_rows(folder / "rows.jsonl", {"yes": "yes", "no": "no"})
    assert task(folder, CHOICE | {"prompt": "Q", "choices": choices, "answer": answer}).items[0].reference == 1


def test_packed_data(folder: Path) -> None:
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress((folder / "rows.jsonl").read_bytes()))
    assert len(task(folder, PLAIN | {"data": "rows.jsonl.gz"}).items) == 3
    (folder / "rows.jsonl.gz").write_bytes((folder / "rows.jsonl.gz").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"rows.jsonl.gz cannot be read"):
        task(folder, PLAIN | {"data": "rows.jsonl.gz"})


CALLS = PLAIN | {"scorer": "function_call"}
WITHOUT = {key: value for key, value in PLAIN.items() if key != "completion"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("a: [", "sums.yaml is not YAML"),
        ("[" * 10_000, "sums.yaml is nested too deeply"),
        ("[]", "sums.yaml is no task file"),
        (PLAIN | {"promt": "x"}, "unknown key 'promt'; the known keys are data, prompt"),
        ({"prompt": "x", "scorer": "number"}, "no 'data'; every task needs data, prompt, scorer"),
        (WITHOUT, "no 'completion', which scorer 'number' needs"),
        (CHOICE | {"answer": None}, "no 'answer', which scorer 'choice' needs"),
        (PLAIN | {"scorer": "bleu"}, "Task sums has no known scorer 'bleu'; take one of choice"),
        (PLAIN | {"stop": "x"}, "stop must be a list of texts, not 'x'"),
        (PLAIN | {"prompt": 5}, "prompt must be a text or a list of messages, not 5"),
        (PLAIN | {"max_new_tokens": 0}, "max_new_tokens must be a positive integer, not 0"),
        (PLAIN | {"few_shot": 3}, "few_shot must be count: NUMBER, not 3"),
        (PLAIN | {"few_shot": {"count": -1}}, "few_shot: count must be a positive integer, not -1"),
        (PLAIN | {"prompt": "{{qestion}}", "few_shot": {"count": 1}}, "rows.jsonl:1: a template of the task fails"),
        (PLAIN | {"prompt": "{{''}}", "few_shot": {"count": 1}}, "rows.jsonl:1: field 'prompt' is empty"),
        (CHOICE | {"answer": "seven", "few_shot": {"count": 1}}, "rows.jsonl:1: the right choice is 'seven'; give"),
        (PLAIN | {"few_shot": {"cuont": 3}}, "few_shot has an unknown key 'cuont'"),
        (PLAIN | {"few_shot": {"count": 5}}, "has 3 rows for few_shot"),
        (PLAIN | {"few_shot": {"count": 3}}, "rows.jsonl has no rows to ask"),
        (PLAIN | {"data": "gone.jsonl"}, "No data file .*gone.jsonl"),
        (PLAIN | {"prompt": "{{qestion}}"}, "rows.jsonl:1: a template of the task fails .*qestion"),
        (PLAIN | {"prompt": "{{question"}, "rows.jsonl:1: a template of the task fails"),
        (PLAIN | {"completion": "{{1 / 0}}"}, "rows.jsonl:1: a template of the task fails .*zero"),
        (PLAIN | {"prompt": "{{''}}"}, "rows.jsonl:1: field 'prompt' is empty"),
        (PLAIN | {"prompt": [{"content": "x"}]}, "rows.jsonl:1: field 'prompt' has a message without a 'role'"),
        (PLAIN | {"prompt": ["x"]}, "rows.jsonl:1: a template of the task fails"),
        (PLAIN | {"reference": "none"}, "rows.jsonl:1: scorer 'number' needs a text with a number as reference"),
        (PLAIN | {"scorer": "sql", "reference": "{{wrong}}"}, "scorer 'sql' needs a text as reference"),
        (PLAIN | {"scorer": "function_call"}, "scorer 'function_call' needs a list of calls"),
        (CALLS | {"reference": "{{ [{'f': {'x': 2}}] }}"}, r"list of calls, each {name: .* as reference, not \[{'f'"),
        (CALLS | {"reference": "{{ [{'name': 'f', 'parameters': {}}] }}"}, r"as reference, not \[{'name'"),
        (CALLS | {"reference": "{{ [{'f': 'x'}] }}"}, "needs a list of calls"),
        (CALLS | {"reference": "{{ [{}] }}"}, "needs a list of calls"),
        (CALLS | {"reference": "{{ [{'f': {'x': []}}] }}"}, r"as reference, not \[{'f'"),
        (PLAIN | {"reference": "{{ [1, 2] }}"}, "scorer 'number' needs a text as reference"),
        (PLAIN | {"scorer": "code"}, "no 'reference', which scorer 'code' needs"),
        (PLAIN | {"scorer": "code", "reference": "{{ {'after': ' '} }}"}, "needs a text of tests, or texts"),
        (PLAIN | {"scorer": "code", "reference": "{{ 5 }}"}, "needs a text of tests, or texts"),
        (CHOICE | {"choices": "A B"}, "rows.jsonl:1: .*choices must be a list, not 'A B'"),
        (CHOICE | {"choices": "{{ {'text': ['5']} }}"}, "rows.jsonl:1: .*choices must be a list"),
        (CHOICE | {"choices": "{{ [none] }}"}, "rows.jsonl:1: .*an answer must be a text, not None"),
        (PLAIN | {"completion": "{{ none }}"}, "rows.jsonl:1: .*an answer must be a text, not None"),
        (PLAIN | {"prompt": "{{ none }}"}, "rows.jsonl:1: .*the prompt must be a text or messages, not None"),
        (PLAIN | {"prompt": "Q: {{ none }}"}, "rows.jsonl:1: .*a field is null"),
        (PLAIN | {"scorer": ["number"]}, r"scorer must be a text, not \['number'\]"),
        (PLAIN | {"name": ["x"]}, r"name must be a text, not \['x'\]"),
        (PLAIN | {"few_shot": {"count": 1, "data": 5}}, "few_shot: data must be a file or a Hub data set, not 5"),
        (PLAIN | {"few_shot": {"count": 1, "data": ""}}, "few_shot: data must be a file or a Hub data set, not ''"),
        (PLAIN | {"few_shot": {"count": 1, "separator": None}}, "few_shot: separator must be a text, not None"),
        (PLAIN | {"reference": "{{none}}"}, "rows.jsonl:1 has no reference"),
        (CHOICE | {"answer": "seven"}, "rows.jsonl:1: the right choice is 'seven'; give its index, from 0 to 2"),
        (CHOICE | {"choices": "{{[]}}"}, "field 'completions' must be a list"),
        (PLAIN | {"prompt": "{{''.__class__.__mro__}}"}, "rows.jsonl:1: a template of the task fails"),
    ],
)
def test_what_is_wrong_is_said(folder: Path, values: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        task(folder, values)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_leaves_no_items_is_refused(folder: Path, limit: int) -> None:
    with pytest.raises(InputError, match=f"limit={limit} leaves no items; give at least 1"):
        read_task(folder / "sums.yaml", limit=limit)


def test_an_unknown_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"The task file gsm8k cannot be read \(No such file"):
        read_task("gsm8k")
    save_rows(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"rows.jsonl has no rows to ask"):
        task(tmp_path, PLAIN)
