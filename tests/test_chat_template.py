"""From text and messages to tokens: what begins and ends a text stands there once, wherever text comes in."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

import tokenizer_kinds as kinds
from icarus.chat_template import Codec
from icarus.context import Context, Specialists
from icarus.errors import InputError
from icarus.streams import IGNORED
from icarus.train import data
from tiny_models import CHATML, SPECIAL, tiny, tiny_tokenizer

BOS, EOS = "<|endoftext|>", "<|im_end|>"
BEGIN, END = SPECIAL.index(BOS), SPECIAL.index(EOS)
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Ho"}


def framing(before: str = "", behind: str = "", template: str = CHATML) -> PreTrainedTokenizerFast:
    """The tiny tokenizer, which puts a special token before or behind each text (Llama 3 and Gemma: before)."""
    tokenizer = tiny_tokenizer(template)
    tokenizer.bos_token = BOS
    frame = " ".join(filter(None, [before, "$A", behind]))
    special = [(token, SPECIAL.index(token)) for token in (before + " " + behind).split()]
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


def test_no_token_that_begins_a_text_carries_loss() -> None:
    """GLM-4's tokenizer puts two."""
    tokenizer = framing(f"{BOS} <|im_start|>")
    assert Codec(tokenizer).beginning == [BEGIN, SPECIAL.index("<|im_start|>")]
    ((_, loss),) = rows(tokenizer, {"text": "ab"})
    assert loss == [False, False, True, True, True]


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


# ------------------------------------------------------------------------------- pieces, with their neighbours in view

all_kinds = pytest.mark.parametrize("kind", kinds.KINDS)
few = settings(max_examples=50, deadline=None)
CHARACTERS = st.sampled_from([*"abHello12 .,'\n\t", "é", "漢", "😀", "\ufffd"])
MARKED = st.sampled_from([kinds.END, "<|im_start|>", "<|end|>"])
TEXTS = st.one_of(st.text(CHARACTERS, min_size=1, max_size=8), MARKED)


@cache
def team_of(kind: str, template: str | None = None) -> Specialists:
    tokenizer = kinds.tokenizer(kind, template)
    return Specialists(tiny(vocab_size=len(tokenizer)), tokenizer)


def begin_of(codec: Codec) -> str:
    return "".join(codec.tokenizer.convert_ids_to_tokens(codec.beginning))


@all_kinds
@few
@given(pieces=st.lists(TEXTS, min_size=1, max_size=5))
def test_text_in_pieces_reads_back_as_it_was_written(kind: str, pieces: list[str]) -> None:
    context = team_of(kind).context()
    codec, whole = context.team.codec, "".join(pieces)
    written = begin_of(codec) + whole
    # Some tokenizers lose a space at the beginning or behind an added token, also of a text in one piece.
    assume(codec.decode(codec.encode(whole), special=True) == written)
    for piece in pieces:
        context.append(piece)
    assert context.text == written
    assert context.rollback(len(codec.encode(pieces[0]))).text == begin_of(codec) + pieces[0]


@all_kinds
def test_a_text_that_is_cut_within_a_word(kind: str) -> None:
    context = team_of(kind).context().append("Hello wor").append("ld how")
    assert context.text.removeprefix(kinds.BEGIN) == "Hello world how"
    (columns, _), *_ = rows(context.team.tokenizer, {"prompt": "Hello wor", "completion": "ld how"})
    assert columns[:-1] == context.token_ids


def speaking(tokens: Iterator[int], turn: int | None = None) -> Any:
    """Instead of a model: ``generate`` says the next ``turn`` tokens, or all that are left."""

    def run(context: Context, speaker: str | None, config: Any, seed: int | None, text: Any) -> None:
        for token in islice(tokens, turn):
            context.token_ids.append(token)
            text.push(token)
        text.flush()

    return patch.object(Context, "_run", run)


@all_kinds
@pytest.mark.parametrize("said", ["generated", "appended"])
@few
@given(text=st.text(CHARACTERS, min_size=1, max_size=12))
def test_a_character_in_several_tokens_is_one(kind: str, said: str, text: str) -> None:
    context = team_of(kind, "ChatML").context().append([USER])
    context._open_answer()
    tokens = context.team.codec.encode(text, after=context.token_ids)
    heard: list[str] = []
    if said == "generated":
        with speaking(iter(tokens), 1):
            turns = [context.generate(stream=heard.append).text for _ in tokens]
        assert "".join(turns) == "".join(heard) == text
    else:
        for token in tokens:
            context.append([token])
    assert context.messages[-1] == {"role": "assistant", "content": text}
    context.append([USER])
    assert context.messages[1:] == [{"role": "assistant", "content": text}, USER]


WORDS = (
    st.tuples(st.sampled_from(["a", "H", "1", "é", "😀"]), st.text(CHARACTERS, max_size=8)).map("".join).map(str.strip)
)


def chat_of(texts: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@all_kinds
@pytest.mark.parametrize("template", kinds.TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_a_chat_in_turns_has_the_tokens_of_the_templates_whole(
    kind: str, template: str, texts: list[tuple[str, str]]
) -> None:
    messages = chat_of([text for pair in texts for text in pair])
    context = team_of(kind, template).context()
    tokenizer = context.team.tokenizer
    whole = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
    want = tokenizer(whole, add_special_tokens=False)["input_ids"]
    ((tokens, loss),) = rows(tokenizer, {"messages": messages})
    assert tokens == want
    for i in range(0, len(messages), 2):
        context.append([messages[i]])
        context._open_answer()
        begin = len(context.token_ids)
        with speaking(iter(tokens[begin : [*loss, False].index(False, begin)])):
            context.generate()
    assert context.token_ids == want
    assert [message["content"].strip() for message in context.messages] == [m["content"] for m in messages]


def test_those_tests_see_pieces_without_their_neighbours() -> None:
    def chat(kind: str) -> None:
        in_turns: Any = test_a_chat_in_turns_has_the_tokens_of_the_templates_whole
        in_turns.hypothesis.inner_test(kind, "Vicuna", [("a", "b"), ("c", "d")])

    def character(kind: str) -> None:
        in_pieces: Any = test_a_character_in_several_tokens_is_one
        in_pieces.hypothesis.inner_test(kind, "generated", " 😀")

    blind = patch.object(Codec, "_following", lambda self, text, after: self._ids(text))
    forgetful = patch.object(Codec, "_opens", lambda self, after: True)
    for kind in ("SentencePiece BPE", "byte fallback, space behind every added token"):
        for fault, tests in ((blind, [test_a_text_that_is_cut_within_a_word, chat]), (forgetful, [character])):
            for test in tests:
                test(kind)
                with fault, pytest.raises(AssertionError):
                    test(kind)


@all_kinds
def test_a_chat_behind_text_brings_no_second_bos(kind: str) -> None:
    context = team_of(kind, "Mistral").context().append("Hello").append([USER])
    assert context.token_ids.count(context.team.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("act", ["append", "message", "score"])
def test_a_lone_surrogate_is_a_sentence(act: str) -> None:
    context = team_of("byte-level BPE", "ChatML").context().append("a")
    before = list(context.token_ids)
    with pytest.raises(InputError, match=r"lone surrogate \('\\udc80' at character \d+\), which is not text; remove"):
        {
            "append": lambda: context.append("ab\udc80"),
            "message": lambda: context.append([{"role": "user", "content": "ab\udc80"}]),
            "score": lambda: context.score("ab\udc80"),
        }[act]()
    assert (context.token_ids, context.messages) == (before, [])


def test_a_lone_surrogate_ends_no_turn() -> None:
    with pytest.raises(InputError, match=r"stop=\['a', '\\ud800'\] holds a lone surrogate"):
        team_of("byte-level BPE").context().append("a").generate(stop=["a", "\ud800"])
