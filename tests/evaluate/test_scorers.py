"""What counts as right."""

from __future__ import annotations

import random
from itertools import permutations
from typing import Any

import pytest

from icarus.evaluate.scorers import SCORERS


@pytest.mark.parametrize(
    ("scorer", "answer", "reference", "score"),
    [
        ("exact_match", " Paris\n", "Paris", 1),
        ("exact_match", "paris", "Paris", 0),
        ("number", "2 + 2 = 4\n#### 4", "#### 4", 1),
        ("number", "#### 1,234.50 dollars", "so\n#### 1234.5", 1),
        ("number", "#### $18", 18, 1),
        ("number", "#### -3", "#### 3", 0),
        ("number", "There are 3, no, 5 of them.", "#### 5", 1),
        ("number", "#### none, but 5", "#### 5", 1),
        ("number", "none", "#### 5", 0),
        ("number", "5\n####", "#### 5", 0),
        ("number", "#### 4\n\nQ: and then?\n#### 7", "#### 4", 1),
        ("number", "0.00001", 1e-05, 1),
        ("number", "-5", 1e-05, 0),
        ("number", "20", 1e20, 0),
        ("number", "about 1.5e3", 1500, 1),
        ("sql", "```SELECT a FROM t```", "SELECT a FROM t", 1),
        ("sql", "```sql SELECT a FROM t```", "SELECT a FROM t", 1),
        ("token_f1", "\u201ca cat\u201d", "\u201c cat\u201d", 1),
        ("sql", "select  a from T where b='X y' ;", 'SELECT A FROM t WHERE B = "X y"', 1),
        ("sql", "SELECT a FROM t WHERE b = 'x y'", "SELECT a FROM t WHERE b = 'X y'", 0),
        ("sql", "SELECT a FROM t WHERE b <> 1", "SELECT a FROM t WHERE b != 1", 1),
        ("sql", "```sql\nSELECT a FROM t\n```", "SELECT a FROM t", 1),
        ("sql", "SELECT a, b FROM t", "SELECT a FROM t", 0),
        ("sql", "SELECT ab FROM t", "SELECT a b FROM t", 0),
        ("token_f1", "The cat sat.", "a cat sat", 1),
        ("token_f1", "cat dog", "cat", 2 / 3),
        ("token_f1", "the cat's re-entry_", "Cats reentry!", 1),
        ("token_f1", "", "cat", 0),
        ("token_f1", "the", "a", 1),
    ],
)
def test_scores(scorer: str, answer: str, reference: Any, score: float) -> None:
    assert SCORERS[scorer](answer, reference) == pytest.approx(score)


BFCL = [{"math.hypot": {"x": [4], "y": [5], "z": ["", 0]}}]
NESTED = [{"find": {"where": [{"city": ["Bern", "Berne"], "tags": [["a", "b"]]}]}}]
OPTIONAL = [{"find": {"where": [{"city": ["Bern", "Berne"], "rooms": ["", 3], "kind": 1}]}}]
OPENAI = [{"name": "add", "arguments": {"a": 1, "b": "two"}}]
EXACT = [{"name": "f", "arguments": {"a": [1, 2], "o": {"flags": [True, False]}}}]


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("math.hypot(x=4, y=5)", BFCL, 1),
        ("[math.hypot(x=4, y=5, z=0)]", BFCL, 1),
        ("math.hypot(x=4, y=5, z=1)", BFCL, 0),
        ("math.hypot(x=4)", BFCL, 0),
        ("math.hypot(x=4, y=5, w=0)", BFCL, 0),
        ("hypot(x=4, y=5)", BFCL, 0),
        ("math.hypot(4, 5)", BFCL, 0),
        ('{"name": "math.hypot", "arguments": {"y": 5.0, "x": 4}}', BFCL, 1),
        ('<tool_call>\n{"name": "math.hypot", "arguments": {"y": 5, "x": 4}}\n</tool_call>', BFCL, 1),
        ('```json\n[{"function": {"name": "math.hypot", "arguments": "{\\"x\\": 4, \\"y\\": 5}"}}]\n```', BFCL, 1),
        ("find(where={'city': 'berne', 'tags': ['a', 'b']})", NESTED, 1),
        ("find(where={'city': 'Rome', 'tags': ['a', 'b']})", NESTED, 0),
        ('{"name": "add", "arguments": {"b": "Two", "a": 1}}', OPENAI, 1),
        ('{"name": "add", "arguments": {"b": "two"}}', OPENAI, 0),
        ('{"name": "add", "arguments": {"b": "two", "a": true}}', OPENAI, 0),
        ("[add(a=1, b='two'), add(a=1, b='two')]", OPENAI, 0),
        ("[g(), add(b='two', a=1)]", [*OPENAI, {"g": {}}], 1),
        ("g(a=1), g(a=2)", [{"g": {"a": [1, 2]}}, {"g": {"a": [1]}}], 1),
        ("g(a=2), g(a=2)", [{"g": {"a": [1, 2]}}, {"g": {"a": [1]}}], 0),
        ("add(a={[1]})", OPENAI, 0),
        ("[]", OPENAI, 0),
        ("find(where={'city': 'Bern', 'kind': 1})", OPTIONAL, 1),
        ("find(where={'city': 'Bern', 'kind': 1, 'rooms': 3})", OPTIONAL, 1),
        ("find(where={'city': 'Bern', 'kind': 1, 'rooms': 4})", OPTIONAL, 0),
        ("find(where={'city': ['Bern', 'Berne'], 'kind': 1})", OPTIONAL, 0),
        ("find(where={'kind': 1})", OPTIONAL, 0),
        ("f(a=[1, 2], o={'flags': [True, False]})", EXACT, 1),
        ("f(a=1, o={'flags': [True, False]})", EXACT, 0),
        ("f(a=[1, 2], o={'flags': True})", EXACT, 0),
        ('```json{"name": "add", "arguments": {"a": 1, "b": "two"}}```', OPENAI, 1),
        ('```JSON {"name": "add", "arguments": {"a": 1, "b": "two"}}```', OPENAI, 1),
        ("```f(a=[1, 2], o={'flags': [True, False]})```", EXACT, 1),
        (f"add(a=1{'0' * 400}+1j)", OPENAI, 0),
        ("I cannot do that.", BFCL, 0),
        ("add(a=x)", OPENAI, 0),
        ("add(**{})", OPENAI, 0),
        ('{"name": "add", "arguments": "{"}', OPENAI, 0),
        ("(" * 10_000, OPENAI, 0),
        ("[" * 100_000, OPENAI, 0),
        ("", OPENAI, 0),
    ],
)
def test_function_calls(answer: str, reference: Any, score: float) -> None:
    assert SCORERS["function_call"](answer, reference) == score


def test_deep_references_end_no_evaluation() -> None:
    deep: Any = []
    for _ in range(600):
        deep = [deep]
    answer = '{"name": "f", "arguments": {"a": ' + "[" * 601 + "]" * 601 + "}}"
    assert SCORERS["function_call"](answer, [{"name": "f", "arguments": {"a": deep}}]) in (0, 1)


def test_matching_calls_is_that_of_all_orders() -> None:
    """Whichever call stands for which."""
    rng = random.Random(0)
    for _ in range(500):
        count = rng.randint(1, 4)
        said = [rng.randint(0, 2) for _ in range(count)]
        wanted = [rng.sample(range(3), rng.randint(1, 3)) for _ in range(count)]
        right = any(all(a in own for a, own in zip(order, wanted, strict=True)) for order in permutations(said))
        answer, reference = ", ".join(f"g(a={a})" for a in said), [{"g": {"a": own}} for own in wanted]
        assert SCORERS["function_call"](f"[{answer}]", reference) == right
