"""Tasks as YAML files: where the rows are, and templates that make items of them.

    data: test.jsonl                    # beside this file, or a Hub data set; gzip is read too
    prompt:                             # messages, or a text
      - role: user
        content: "{{question}}"
    completion: "{{answer}}"            # what is right; its loss is taken
    scorer: number

Templates are Jinja's, as in lm-evaluation-harness, with a row's fields as variables. One that is a single
``{{expression}}`` gives what that is and need not be text: a list of choices, tool descriptions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined
from jinja2.nodes import Output, TemplateData
from jinja2.sandbox import ImmutableSandboxedEnvironment

from icarus import arguments
from icarus.errors import DataError, IcarusError, InputError, first_line
from icarus.evaluate.scorers import CHOICE, CODE
from icarus.evaluate.tasks import Item, Task, check_choice
from icarus.train import data

Row = dict[str, Any]


def _present(value: Any) -> Any:
    if value is None:
        raise ValueError("a field is null")
    return value


_JINJA = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_present)


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """Solved rows that stand before every question."""

    count: int
    data: str | None = None
    """Where they are (default: the first rows of the task's own data, which are then not asked)."""
    separator: str = "\n\n"
    """Between texts; messages follow one another as the chat template has it."""


@dataclass(frozen=True, kw_only=True)
class TaskFile:
    """The keys of a task's file; all but those with a default must be there."""

    data: str
    prompt: Any
    """A text, messages, or an expression that gives either."""
    scorer: str
    name: str | None = None
    """Default: the file's name."""
    completion: Any = None
    """What follows the prompt if the answer is right."""
    reference: Any = None
    """What answers are compared with (default: the completion)."""
    choices: Any = None
    """For ``scorer: choice``: texts, or an expression that gives a list of them."""
    answer: Any = None
    """The right choice: its index or its text."""
    tools: Any = None
    """For the chat template: an expression that gives a list."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    few_shot: FewShot | None = None
    stop: list[str] = field(default_factory=list)
    max_new_tokens: int = 256


def read(source: str | Path, *, limit: int | None = None) -> Task:
    """The task of a YAML file, with its first ``limit`` items.

    Raises:
        InputError: no such file, a key in it is unknown, missing or of the wrong kind, or the limit is below 1.
        DataError: there are no rows, or an item cannot be made of one; the message names it.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit} leaves no items; give at least 1, or None for all.")
    path = Path(source).expanduser()
    return _task(_parsed(path), path, limit)


def _parsed(path: Path) -> TaskFile:
    values = arguments.read_yaml(path, "task file")
    if isinstance(shots := values.get("few_shot"), dict):
        values["few_shot"] = _filled(FewShot, shots, f"{path}, few_shot")
    file: TaskFile = _filled(TaskFile, values, str(path))
    _check(file, path)
    return file


def _filled(kind: Any, values: Mapping[Any, Any], where: str) -> Any:
    known = {entry.name: entry for entry in fields(kind)}
    if unknown := values.keys() - known:
        raise InputError(
            f"{where} has an unknown key {min(unknown, key=str)!r}; the known keys are {', '.join(known)}."
        )
    needed = [name for name, entry in known.items() if entry.default is entry.default_factory is MISSING]
    if missing := [name for name in needed if values.get(name) in (None, "")]:
        raise InputError(f"{where} has no {missing[0]!r}; every task needs {', '.join(needed)}.")
    return kind(**values)


def _check(file: TaskFile, path: Path) -> None:
    def wanted(key: str, fits: bool, what: str) -> None:
        if not fits:
            raise InputError(f"{path}: {key} must be {what}, not {getattr(file, key)!r}.")

    wanted("data", isinstance(file.data, str), "a file or a Hub data set")
    wanted("scorer", isinstance(file.scorer, str), "a text")
    wanted("name", file.name is None or isinstance(file.name, str), "a text")
    wanted("prompt", isinstance(file.prompt, str | list), "a text or a list of messages")
    stops = isinstance(file.stop, list) and all(isinstance(stop, str) and stop for stop in file.stop)
    wanted("stop", stops, "a list of texts")
    wanted("max_new_tokens", type(file.max_new_tokens) is int and file.max_new_tokens > 0, "a positive integer")
    wanted("chat_template_kwargs", isinstance(file.chat_template_kwargs, dict), "an object")
    wanted("few_shot", file.few_shot is None or isinstance(file.few_shot, FewShot), "count: NUMBER")
    if file.few_shot:
        _check_few_shot(file.few_shot, f"{path}, few_shot")
    parts = {CHOICE: ("choices", "answer"), CODE: ("completion", "reference")}.get(file.scorer, ("completion",))
    if missing := [part for part in parts if getattr(file, part) is None]:
        raise InputError(f"{path} has no {missing[0]!r}, which scorer {file.scorer!r} needs; give a template for it.")


def _check_few_shot(shots: FewShot, where: str) -> None:
    if type(shots.count) is not int or shots.count < 1:
        raise InputError(f"{where}: count must be a positive integer, not {shots.count!r}.")
    if shots.data is not None and not (isinstance(shots.data, str) and shots.data):
        raise InputError(f"{where}: data must be a file or a Hub data set, not {shots.data!r}.")
    if not isinstance(shots.separator, str):
        raise InputError(f"{where}: separator must be a text, not {shots.separator!r}.")


def _task(file: TaskFile, path: Path, limit: int | None) -> Task:
    source = _beside(path, file.data)
    rows = data.objects(source)
    shots = _shots(file, path, rows)
    items = [_item(file, row, source, shots) for row in islice(rows, limit)]
    if not items:
        raise DataError(f"{source} has no rows to ask; give a file with at least one.")
    return Task(
        name=file.name or path.stem,
        items=items,
        scorer=file.scorer,
        stop=tuple(file.stop),
        max_new_tokens=file.max_new_tokens,
    )


def _beside(path: Path, source: str) -> str:
    local = path.parent / Path(source).expanduser()
    return str(local) if local.exists() or Path(source).suffix in (".jsonl", ".json", ".gz") else source


# ------------------------------------------------------------------------------------------------ items


def _item(file: TaskFile, row: Row, source: str, shots: Sequence[Row]) -> Item:
    with _naming(source, row) as name:
        asked = _row(file, row)
        asked["prompt"] = _behind(shots, asked["prompt"], file)
        data.check(asked, ("prompt", "completions" if file.scorer == CHOICE else "completion"), name)
        return Item(name=name, row=asked, reference=_reference(file, row, asked))


@contextmanager
def _naming(source: str, row: Row) -> Iterator[str]:
    """The name of a row's item, which errors inside the block begin with."""
    name = f"{Path(source).name}:{row[data.LINE]}"
    try:
        yield name
    except IcarusError:
        raise
    except Exception as error:  # templates are programs of their own and raise what they like
        raise DataError(f"{name}: a template of the task fails ({first_line(error)}); mend it, or the row.") from error


def _row(file: TaskFile, row: Row) -> Row:
    """A row of training data, without examples."""
    made: Row = {"prompt": _prompt(file.prompt, row), "chat_template_kwargs": file.chat_template_kwargs}
    if file.tools is not None:
        made["tools"] = _value(file.tools, row)
    if file.scorer == CHOICE:
        choices = _value(file.choices, row)
        if isinstance(choices, str | Mapping):
            raise TypeError(f"choices must be a list, not {choices!r:.40}")
        made["completions"] = [_completion(choice, made["prompt"]) for choice in choices]
    else:
        made["completion"] = _completion(_value(file.completion, row), made["prompt"])
    return made


def _completion(value: Any, prompt: Any) -> Any:
    """What the assistant says, if the prompt is a chat."""
    if not isinstance(value, str | int | float | list):
        raise TypeError(f"an answer must be a text, not {value!r:.40}")
    if isinstance(prompt, str) or isinstance(value, list):
        return value if isinstance(value, list) else str(value)
    return [{"role": "assistant", "content": str(value)}]


def _reference(file: TaskFile, row: Row, asked: Row) -> Any:
    if file.scorer == CHOICE:
        answer = _value(file.answer, row)
        return _index(answer, [_text(choice) for choice in asked["completions"]]) if isinstance(answer, str) else answer
    return _text(asked["completion"]) if file.reference is None else _value(file.reference, row)


def _index(answer: str, texts: list[str]) -> int | str:
    """Of the choice with this text, but for white space if there is no other; or the number that the text is."""
    if answer in texts:
        return texts.index(answer)
    alike = [index for index, text in enumerate(texts) if text.strip() == answer.strip()]
    if len(alike) == 1:
        return alike[0]
    return int(answer) if answer.strip().isdecimal() else answer


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else "".join(m.get("content") or "" for m in completion)


def _shots(file: TaskFile, path: Path, rows: Iterator[Row]) -> list[Row]:
    """The solved rows; those of the task's own data are taken off it."""
    if file.few_shot is None:
        return []
    source = _beside(path, file.few_shot.data or file.data)
    own = _same(source, _beside(path, file.data))
    solved = list(islice(rows if own else data.objects(source), file.few_shot.count))
    if len(solved) < file.few_shot.count:
        raise DataError(f"{source} has {len(solved)} rows for few_shot; lower its count.")
    return [_solved(file, row, source) for row in solved]


def _same(one: str, other: str) -> bool:
    """Whether two names are of one data set."""
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


def _solved(file: TaskFile, row: Row, source: str) -> Row:
    """A row's prompt, and the completion that is right."""
    with _naming(source, row) as name:
        one = _row(file, row)
        data.check(one, ("prompt", "completions" if file.scorer == CHOICE else "completion"), name)
        if file.scorer != CHOICE:
            return {"prompt": one["prompt"], "completion": one["completion"]}
        right = _reference(file, row, one)
        check_choice(name, right, one["completions"])
        return {"prompt": one["prompt"], "completion": one["completions"][right]}


def _behind(shots: Sequence[Row], prompt: Any, file: TaskFile) -> Any:
    """The prompt behind solved ones, whose system messages are left out."""
    if not shots or file.few_shot is None:
        return prompt
    if any(isinstance(shot["prompt"], str) != isinstance(prompt, str) for shot in shots):
        raise TypeError("of this row and the solved ones of few_shot one is a chat and another a text")
    if isinstance(prompt, str):
        return "".join(f"{shot['prompt']}{shot['completion']}{file.few_shot.separator}" for shot in shots) + prompt
    solved = [message for shot in shots for message in (*_chat(shot["prompt"]), *shot["completion"])]
    return [*(message for message in prompt if message["role"] == "system"), *solved, *_chat(prompt)]


def _chat(messages: list[Row]) -> list[Row]:
    return [message for message in messages if message["role"] != "system"]


# -------------------------------------------------------------------------------------------- templates


def _value(template: Any, row: Row) -> Any:
    """What a template gives: text, or what its single expression is; lists and objects part by part."""
    if isinstance(template, list):
        return [_value(part, row) for part in template]
    if isinstance(template, dict):
        return {key: _value(part, row) for key, part in template.items()}
    expression = _expression(template) if isinstance(template, str) else None
    if expression is None:
        return _filled_in(template, row)
    value = _JINJA.compile_expression(expression, undefined_to_none=False)(**row)
    if isinstance(value, StrictUndefined):
        str(value)  # raises, and says what is missing
    around = template != template.strip()
    return _filled_in(template, row) if around and isinstance(value, str | int | float) else value


@cache
def _expression(template: str) -> str | None:
    """What stands in a template that is a single ``{{expression}}``, but for white space."""
    bare = template.strip()
    parsed = _JINJA.parse(bare).body
    if len(parsed) != 1 or not isinstance(parsed[0], Output) or not bare.startswith("{{"):
        return None
    if len(parsed[0].nodes) != 1 or isinstance(parsed[0].nodes[0], TemplateData):
        return None
    return re.sub(r"^[-+]|[-+]$", "", bare[2:-2])  # white-space control


def _filled_in(template: Any, row: Row) -> Any:
    return _JINJA.from_string(template).render(**row) if isinstance(template, str) else template


def _prompt(template: Any, row: Row) -> Any:
    """A text or messages."""
    if isinstance(template, list):
        return [{key: _filled_in(part, row) for key, part in dict(message).items()} for message in template]
    value = _value(template, row)
    if not isinstance(value, str | int | float | list):
        raise TypeError(f"the prompt must be a text or messages, not {value!r:.40}")
    return value if isinstance(value, list) else str(value)
