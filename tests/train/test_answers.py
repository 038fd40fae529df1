"""Loss is on what the assistant said and on the token that ends it, with chat templates of many manners."""

from __future__ import annotations

from typing import Any

import pytest

import tokenizer_kinds as kinds
from icarus.chat_template import Codec
from icarus.errors import DataError
from icarus.streams import IGNORED
from icarus.train import answers, data
from tiny_models import CHATML, STRIPPING, tiny_tokenizer

END = "<|im_end|>"
Row = dict[str, Any]


def chat(*turns: str) -> list[dict[str, Any]]:
    """``chat("u:hi", "a:ho")``"""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


def losses(row: Row, tokenizer: Any) -> list[str]:
    """The texts that carry loss."""
    columns = data.tokenize(row, Codec(tokenizer), None)
    texts: list[list[int]] = [[]]
    for token, label in zip(columns["input_ids"], columns["labels"], strict=True):
        texts[-1:] = [texts[-1] + [token]] if label != IGNORED else [texts[-1], []]
    return [tokenizer.decode(tokens) for tokens in texts if tokens]


SYSTEM = "{{ '<|im_start|>system\nYou help.<|im_end|>\n' if messages[0].role != 'system' }}"
DEFAULT_SYSTEM = SYSTEM + CHATML
HEADER = (
    "{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content.strip() + '<|im_end|>\n' }}"
)
GEMMA = (
    "{% if messages[0].role == 'tool' %}{{ raise_exception('no') }}{% endif %}{% for m in messages %}"
    + HEADER
    + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
THINKING = CHATML.replace("m['content'] +", "('<think></think>' if m.role == 'assistant' else '') + m['content'] +")
ASKED_ONLY = (
    "{% if messages[-1].role == 'system' and add_generation_prompt %}{{ raise_exception('?') }}{% endif %}" + CHATML
)


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM, GEMMA, STRIPPING, ASKED_ONLY])
@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (chat("a:Hello", "u:hi", "a:ho"), ["Hello", "ho"]),
        (chat("a:Hello"), ["Hello"]),
        (chat("s:x", "a:Hello", "a:again"), ["Hello", "again"]),
        (chat("u:hi", "a:ho", "a:no", "u:x", "a:"), ["ho", "no", ""]),
    ],
)
def test_nobody_else_carries_loss(template: str, messages: list[Row], said: list[str]) -> None:
    assert losses({"messages": messages}, tiny_tokenizer(template)) == [text + END for text in said]


def test_that_test_sees_loss_on_a_default_system_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_start", lambda chat, index, whole, codec: 0)
    with pytest.raises(AssertionError):
        test_nobody_else_carries_loss(DEFAULT_SYSTEM, chat("a:Hello"), ["Hello"])


def test_what_the_generation_prompt_leaves_open_is_said_by_the_assistant() -> None:
    """As TRL has it: with Qwen3's template a specialist that does not think must say so itself."""
    tokenizer = tiny_tokenizer(THINKING)
    assert losses({"messages": chat("u:a", "a:b")}, tokenizer) == ["<think></think>b" + END]
    assert losses({"messages": chat("a:b")}, tokenizer) == ["b" + END]  # nothing prompts this one


@pytest.mark.parametrize("kind", kinds.KINDS)
@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("ChatML", "{}<|im_end|>"),
        ("Llama 2", "{} </s>"),
        ("Mistral", "{}</s>"),
        ("Phi-3", "{}<|end|>"),
        ("Vicuna", "{}</s>"),
    ],
)
def test_in_every_tokenizer(kind: str, template: str, said: str) -> None:
    tokenizer = kinds.tokenizer(kind, template)
    carried = losses({"messages": chat("u:Hi", "a:Hello", "u:Hi", "a:fine")}, tokenizer)
    assert [text.strip() for text in carried] == [said.format("Hello"), said.format("fine")]


# --------------------------------------------------------------------------------- templates that do not tell

LOOP = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
UNPROMPTED = LOOP + "{{ m.content + '<|im_end|>\n' }}{% endfor %}"  # a header, and no generation prompt
TAGGED = (
    LOOP + "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
TAGGED_TEXT = TAGGED.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}")
TAGGED_LINE = TAGGED.replace("+ '<|im_end|>' }}{% endgeneration %}", "+ '<|im_end|>\n' }}{% endgeneration %}")
TAGGED_PARTS = TAGGED.replace(
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}",
    "{{ m.content }}{% endgeneration %}{{ '\n' }}{% generation %}{{ '<|im_end|>' }}{% endgeneration %}",
)
REWRITING = STRIPPING.replace(
    "text + '<|im_end|>\n' }}",
    "' ' }}{% if m.role == 'assistant' %}{% generation %}{{ text + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ text + '<|im_end|>' }}{% endif %}{{ '\n' }}",
)


@pytest.mark.parametrize("template", [TAGGED, TAGGED_TEXT, TAGGED_LINE])
def test_generation_tags_tell_where_nothing_else_does(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    assert losses({"messages": chat("u:a", "a:b", "u:c", "a:d")}, tokenizer) == ["b" + END, "d" + END]
    assert losses({"prompt": chat("u:a", "a:b", "u:c"), "completion": chat("a:d")}, tokenizer) == ["d" + END]
    weighted = [
        {**message, "weight": 0} if message["content"] == "b" else message for message in chat("u:a", "a:b", "a:c")
    ]
    assert losses({"messages": weighted}, tokenizer) == ["c" + END]


def test_generation_tags_tell_where_a_template_rewrites() -> None:
    messages = chat("u:a", "a:<think>b</think>c", "u:d", "a:e")
    assert losses({"messages": messages}, tiny_tokenizer(REWRITING)) == ["c" + END, "e" + END]


def test_several_tags_in_an_answer() -> None:
    tokenizer = tiny_tokenizer(TAGGED_PARTS)
    assert losses({"messages": chat("u:a", "a:b", "u:c", "a:d")}, tokenizer) == ["b", END, "d", END]
    with pytest.raises(DataError, match="does not tell where the answer in message 3"):  # which part is whose?
        losses({"prompt": chat("u:a", "a:b", "u:c"), "completion": chat("a:d")}, tokenizer)


@pytest.mark.parametrize(
    ("template", "messages", "which"),
    [
        (UNPROMPTED, chat("u:a", "a:b"), 1),
        (CHATML.replace("m['content']", "m['content'] | upper"), chat("a:b"), 0),
        (CHATML.replace("{% if add", "{{ 'So: ' }}{% if add"), chat("u:a", "a:b", "u:c"), 1),
    ],
    ids=["header without generation prompt", "hides the first answer", "a prompt that the chat lacks"],
)
def test_a_template_that_does_not_tell_is_refused(template: str, messages: list[Row], which: int) -> None:
    with pytest.raises(DataError, match=rf"message {which} (begins; put {{% generation %}} tags|differently)"):
        losses({"messages": messages}, tiny_tokenizer(template))


def test_an_end_token_that_stands_before_the_next_message_only() -> None:
    template = (
        "{% for m in messages %}{{ ('' if loop.first else '<|im_end|>') + '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_end|><|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = tiny_tokenizer(template)
    assert losses({"messages": chat("u:a", "a:b", "u:c", "a:d")}, tokenizer) == ["b" + END, "d"]


# --------------------------------------------------------------------------------------------- weights


def weighted(*weights: int | None) -> list[dict[str, Any]]:
    messages = chat("u:a", "a:b", "u:c", "a:d")
    for message, weight in zip(messages, weights, strict=True):
        message.update({} if weight is None else {"weight": weight})
    return messages


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ((None, 0, None, 1), ["d" + END]),
        ((0, 1, 0, 0), ["b" + END]),
        ((None, 0, None, 0), []),
        ((None, None, None, None), ["b" + END, "d" + END]),
    ],
)
def test_a_message_of_weight_0_carries_no_loss_and_the_same_tokens(
    weights: tuple[int | None, ...], said: list[str]
) -> None:
    show = CHATML.replace("m['content'] +", "m['content'] + ('!' if 'weight' in m else '') +")
    row, plain = {"messages": weighted(*weights)}, {"messages": weighted(None, None, None, None)}
    tokenizer = tiny_tokenizer(show)
    assert losses(row, tokenizer) == said
    tokens = [data.tokenize(each, Codec(tokenizer), None)["input_ids"] for each in (row, plain)]
    assert tokens[0] == tokens[1]
