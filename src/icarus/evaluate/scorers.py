"""From an answer and its reference to a score between 0 and 1; what is right, as the field's benchmarks have it.

A scorer takes the generated text and the item's reference. The reference is what it says; answers may be anything.
"""

from __future__ import annotations

import ast
import json
import re
import string
from collections import Counter
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from icarus.evaluate import sandbox

Scorer = Callable[[str, Any], float]

CODE = "code"
"""The scorer that runs what a model wrote."""

_NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_MARK = "####"
_SQL_TOKEN = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|[\w.]+|<>|!=|<=|>=|==|\S""")
_FENCE = re.compile(r"```(?:\w*[ \t]*\r?\n|(?i:json|python|sql)\b)?(.*?)(?:```|$)", re.DOTALL)
_TOOL_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)


def exact_match(answer: str, reference: Any) -> float:
    """Equal but for white space around."""
    return float(answer.strip() == str(reference).strip())


def number(answer: str, reference: Any) -> float:
    """The number behind the first ``####``, as GSM8K has it; without that mark the last number that stands there."""
    said, wanted = _number(answer), _number(str(reference))
    return float(said is not None and said == wanted)


def token_f1(answer: str, reference: Any) -> float:
    """Harmonic mean of precision and recall of words, as SQuAD has it: without articles, case and punctuation."""
    said, wanted = _words(answer), _words(str(reference))
    if not said or not wanted:
        return float(said == wanted)
    same = (Counter(said) & Counter(wanted)).total()
    return 2 * same / (len(said) + len(wanted))


def sql(answer: str, reference: Any) -> float:
    """The same query but for white space, case outside of quotes, kind of quotes, and a semicolon at the end."""
    return float(_sql(answer) == _sql(str(reference)))


def function_call(answer: str, reference: Any) -> float:
    """The same calls, in any order; JSON or Python.

    The reference is a list of ``{name: {argument: [allowed values]}}`` (BFCL's form), where ``""`` among the values
    lets an argument be left out, also within allowed objects; or of ``{"name": ..., "arguments": {...}}``, which must
    be met exactly. Texts are equal but for case and white space.
    """
    calls = _calls(answer)
    wanted = reference if isinstance(reference, list) else [reference]
    if not calls or len(calls) != len(wanted):
        return 0.0
    try:
        meets = np.array([[_meets(call, one) for one in wanted] for call in calls])
    except RecursionError:
        return 0.0
    return float(meets[linear_sum_assignment(meets, maximize=True)].all())  # each call another one of those wanted


def code(answer: str, reference: Any) -> float:
    """A Python program of the answer and its tests runs to its end, in a sandbox.

    The reference is what stands behind the answer, or ``{"before": ..., "after": ...}``: with HumanEval the prompt is a
    part of the program. Of an answer with a fenced block only that counts.

    Raises:
        InputError: this machine has no sandbox.
    """
    parts = reference if isinstance(reference, dict) else {"after": reference}
    fenced = _FENCE.search(answer)
    return float(sandbox.passes(f"{parts.get('before', '')}{fenced[1] if fenced else answer}\n{parts['after']}\n"))


SCORERS: dict[str, Scorer] = {
    CODE: code,
    "exact_match": exact_match,
    "function_call": function_call,
    "number": number,
    "sql": sql,
    "token_f1": token_f1,
}
"""By the name that a task gives; ``choice`` is another one, which takes no answer."""

CHOICE = "choice"
"""The scorer of items with choices: 1 if the right one is the most likely of them."""


def misfit(scorer: str, reference: Any) -> str | None:
    """What the reference would have to be for this scorer; None if it is."""
    if scorer == "function_call":
        calls = reference if isinstance(reference, list) else [reference]
        return None if calls and all(map(_is_call, calls)) else _CALLS
    if scorer == CODE:
        parts = reference if isinstance(reference, dict) else {"after": reference}
        texts = all(isinstance(part, str) for part in parts.values()) and str(parts.get("after", "")).strip()
        fits = texts and parts.keys() <= {"after", "before"}
        return None if fits else "a text of tests, or texts 'before' and 'after'"
    if not isinstance(reference, str | int | float) or not str(reference).strip():
        return "a text"
    return "a text with a number" if scorer == "number" and _number(str(reference)) is None else None


def _is_call(wanted: Any) -> bool:
    """In one of the two forms that ``function_call`` takes."""
    if not isinstance(wanted, dict) or _is_exact(wanted):
        return isinstance(wanted, dict)
    allowed = next(iter(wanted.values()), None)
    if len(wanted) != 1 or not isinstance(allowed, dict):
        return False
    return all(isinstance(values, list) and values for values in allowed.values())


def _is_exact(wanted: dict[str, Any]) -> bool:
    return isinstance(wanted.get("name"), str) and isinstance(wanted.get("arguments"), dict)


# ------------------------------------------------------------------------------------------- what they read


def _number(text: str) -> Decimal | None:
    marked = text.partition(_MARK)[2] if _MARK in text else None
    numbers = _NUMBER.findall(text if marked is None else marked)
    if not numbers:
        return None
    try:
        return Decimal(re.sub(r"[$,]", "", numbers[-1] if marked is None else numbers[0]))
    except InvalidOperation:
        return None


def _words(text: str) -> list[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _sql(text: str) -> list[str]:
    fenced = _FENCE.search(text)
    tokens = _SQL_TOKEN.findall((fenced[1] if fenced else text).strip().rstrip("; \n\t"))
    return [_sql_token(token) for token in tokens]


def _sql_token(token: str) -> str:
    if len(token) > 1 and token[0] == token[-1] and token[0] in "'\"":
        return f"'{token[1:-1].replace(2 * token[0], token[0])}'"
    return {"<>": "!=", "==": "="}.get(token, token.lower())


_CALLS = 'a list of calls, each {name: {argument: [one value or more]}} or {"name": ..., "arguments": {...}},'
Call = tuple[str, dict[str, Any]]


def _calls(text: str) -> list[Call] | None:
    """The calls that an answer makes; None if it is neither JSON nor Python."""
    tagged = _TOOL_CALL.findall(text)
    fenced = _FENCE.search(text)
    if tagged:
        parsed = [_parsed(part) for part in tagged]
        return None if any(part is None for part in parsed) else [call for part in parsed for call in part or ()]
    return _parsed(fenced[1] if fenced else text)


def _parsed(text: str) -> list[Call] | None:
    text = text.strip()
    try:
        return _of_json(json.loads(text))
    except (ValueError, RecursionError):
        pass
    try:
        return _of_python(ast.parse(text, mode="eval").body)
    except Exception:  # whatever a model writes: syntax, depth, sets of lists, sums that overflow
        return None


def _of_json(value: Any) -> list[Call] | None:
    calls = []
    for call in value if isinstance(value, list) else [value]:
        call = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        arguments = call.get("arguments", call.get("parameters", {}))
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(arguments, dict):
            return None
        calls.append((call["name"], arguments))
    return calls


def _of_python(node: ast.expr) -> list[Call] | None:
    nodes = node.elts if isinstance(node, ast.List | ast.Tuple) else [node]
    calls = []
    for call in nodes:
        if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
            return None
        calls.append((ast.unparse(call.func), {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}))
    return calls


def _meets(call: Call, wanted: Any) -> bool:
    name, given = call
    if _is_exact(wanted):
        return name == wanted["name"] and _same(given, wanted["arguments"])
    ((right, allowed),) = wanted.items()
    return name == right and _fits(given, allowed)


def _fits(given: dict[str, Any], allowed: dict[str, Any]) -> bool:
    """Whether an object has allowed fields alone, and each has an allowed value or may be left out."""
    if given.keys() - allowed.keys():
        return False
    choices = {name: values if isinstance(values, list) else [values] for name, values in allowed.items()}
    return all(
        any(_is_allowed(given[name], value) for value in values) if name in given else "" in values
        for name, values in choices.items()
    )


def _is_allowed(value: Any, allowed: Any) -> bool:
    if isinstance(value, dict) and isinstance(allowed, dict):
        return _fits(value, allowed)
    if isinstance(value, list | tuple) and isinstance(allowed, list | tuple):
        return len(value) == len(allowed) and all(map(_is_allowed, value, allowed))
    return _same(value, allowed)


def _same(one: Any, other: Any) -> bool:
    """Equal; texts but for case and white space."""
    if isinstance(one, str) and isinstance(other, str):
        return " ".join(one.lower().split()) == " ".join(other.lower().split())
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other)
