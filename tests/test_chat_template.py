"""From text and messages to tokens: what begins and ends a text stands there once, wherever text comes in."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from conftest import CHATML, SPECIAL, tiny, tiny_tokenizer
from icarus.chat_template import Codec
from icarus.context import Specialists
from icarus.errors import InputError
from icarus.streams import IGNORED
from icarus.train import data

BOS, EOS = "<|endoftext|>", "<|im_end|>"
BEGIN, END = SPECIAL.index(BOS), SPECIAL.index(EOS)
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Ho"}


def framing(before: str = "", behind: str = "", template: str = CHATML) -> PreTrainedTokenizerFast:
    """The tiny tokenizer, which puts a special token before or behind each text (Llama 3 and Gemma: before)."""
    tokenizer = tiny_tokenizer(template)
    tokenizer.bos_token = BOS
    frame = " ".join(filter(None, [before, "$A", behind]))
    special = [(token, SPECIAL.index(token)) for token in (before, behind) if token]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=special)
    return tokenizer


def rows(tokenizer: Any, *given: dict[str, Any]) -> list[tuple[list[int], list[bool]]]:
    """Tokens of training rows, and which of them carry loss."""
    columns = (data.tokenize(row, Codec(tokenizer), None) for row in given)
    return [(row["input_ids"], [label != IGNORED for label in row["labels"]]) for row in columns]


TOKENIZERS = {
    "none": framing(),
    "BOS": framing(BOS),
    "BOS, and so does the template": framing(BOS, template="{{ bos_token }}" + CHATML),
    "none, but the template does": framing(template="{{ bos_token }}" + CHATML),
    "BOS and EOS": framing(BOS, EOS),
    "EOS": framing("", EOS),
}


@pytest.mark.parametrize("adds", TOKENIZERS)
def test_a_text_begins_with_bos_once_in_rows_contexts_and_scores(adds: str) -> None:
    tokenizer = TOKENIZERS[adds]
    begin = [BEGIN] if adds.startswith("BOS") else []
    plain = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("ab", "cd")}
    want = [*begin, *plain["ab"], *plain["cd"]]
    texts: list[dict[str, Any]] = [
        {"text": "abcd"},
        {"prompt": "ab", "completion": "cd"},
        {"prompt": "ab", "completions": ["cd"]},
    ]
    for got, loss in rows(tokenizer, *texts):
        assert got == [*want, END]
        assert loss[-3:] == [True] * 3  # completion and EOS
    context = Specialists(tiny(), tokenizer).context()
    assert context.append("ab").append("cd").token_ids == want
    assert len(context.score("ab")["base"]) == 2
    # What vLLM's server makes of a prompt, but for an EOS, behind which nothing could go on.
    assert tokenizer("abcd")["input_ids"] == [*want, *([END] if adds.endswith("EOS") else [])]


@pytest.mark.parametrize("adds", TOKENIZERS)
def test_a_chat_has_the_bos_that_its_template_writes_and_no_other(adds: str) -> None:
    """As vLLM's server has it: what the template writes, and nothing added to it."""
    tokenizer = TOKENIZERS[adds]
    prompt, whole = (
        tokenizer.apply_chat_template(messages, return_dict=False, add_generation_prompt=header)
        for messages, header in (([USER], True), ([USER, ANSWER], False))
    )
    assert (prompt[0] == BEGIN) == ("template" in adds)
    assert BEGIN not in prompt[1:]
    for got, loss in rows(tokenizer, {"messages": [USER, ANSWER]}, {"prompt": [USER], "completion": [ANSWER]}):
        assert got == whole[:-1]  # without the newline behind the end token
        assert got[: loss.index(True)] == prompt
    context = Specialists(tiny(), tokenizer).context().append([USER])
    assert context.append([ANSWER]).token_ids == whole
    context.rollback(0).append([USER]).generate(max_new_tokens=1)
    assert context.token_ids[:-1] == prompt


@pytest.mark.parametrize("adds", ["none", "BOS", "BOS and EOS"])
def test_bos_and_eos_that_a_text_has_already_are_not_written_twice(adds: str) -> None:
    tokenizer = TOKENIZERS[adds]
    text = ("<|endoftext|>" if adds != "none" else "") + "ab"
    once = rows(tokenizer, {"text": "ab"}, {"prompt": "a", "completion": "b"})
    assert rows(tokenizer, {"text": text + EOS}, {"prompt": text[:-1], "completion": "b" + EOS}) == once
    context = Specialists(tiny(), tokenizer).context().append(text)
    assert context.token_ids == once[0][0][:-1]


def test_a_tokenizer_without_eos_ends_no_text() -> None:
    tokenizer = framing(BOS)
    tokenizer.eos_token = None
    assert rows(tokenizer, {"text": "a"})[0][0] == [BEGIN, tokenizer.convert_tokens_to_ids("a")]


def test_a_tokenizer_without_a_template_renders_nothing() -> None:
    with pytest.raises(InputError, match="no chat template; give text"):
        Codec(tiny_tokenizer(None)).render([USER])
