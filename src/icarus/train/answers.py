"""Which parts of a rendered chat the assistant said: what training puts loss on.

An answer is what follows the template's generation prompt, to the end of the message and its end token, as far as the
template writes an answer as it writes the prompt for it. Where it does not, its ``{% generation %}`` tags tell
(Transformers' ``return_assistant_tokens_mask``), else the chat is refused: loss on a header or on a system prompt that
nobody wrote would train a model to say them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from icarus.chat_template import Codec, Message
from icarus.errors import DataError, InputError


@dataclass(frozen=True)
class Answer:
    """Characters ``start`` to ``end`` of a rendered chat; without ``loss`` if the row gives it ``weight: 0``."""

    start: int
    end: int
    loss: bool


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Messages, those from ``first`` on to be trained, and what else the chat template gets."""

    messages: Sequence[Message]
    first: int = 0
    tools: list[Any] | None = None
    options: Mapping[str, Any]

    @property
    def trained(self) -> list[int]:
        """The assistant messages from ``first`` on."""
        return [i for i in range(self.first, len(self.messages)) if self.messages[i]["role"] == "assistant"]


def rendered(chat: Chat, codec: Codec) -> tuple[str, list[Answer]]:
    """The chat as text, and the answers in it.

    Raises:
        DataError: the template does not tell where an answer begins, or renders it differently once others follow.
        InputError: the template refuses the messages.
    """
    whole = codec.render(chat.messages, chat.tools, **chat.options)
    try:
        spans = _prompted(chat, whole, codec)
    except InputError:
        tagged = _tagged(chat, whole, codec)
        if tagged is None:
            raise
        spans = tagged
    if len(spans) != len(chat.trained):  # a template may tag the parts of an answer; then all of them carry loss
        return whole, [Answer(*span, loss=True) for span in spans]
    weights = [chat.messages[index].get("weight") for index in chat.trained]
    return whole, [Answer(*span, loss=weight != 0) for span, weight in zip(spans, weights, strict=True)]


def _prompted(chat: Chat, whole: str, codec: Codec) -> list[tuple[int, int]]:
    """Each answer from the end of its generation prompt to the end of its message."""
    spans: list[tuple[int, int]] = []
    for index in chat.trained:
        until = codec.render(chat.messages[: index + 1], chat.tools, **chat.options).rstrip()
        if not whole.startswith(until):
            raise DataError(
                f"the chat template renders message {index} differently once others follow, so a chat cannot be "
                "trained in one row; give one row a turn, as 'prompt' and 'completion'."
            )
        start = _start(chat, index, whole, codec)
        if start is None or (spans and start < spans[-1][1]):
            raise DataError(
                f"the chat template does not tell where the answer in message {index} begins; put {{% generation %}} "
                "tags around answers in it, or give 'prompt' and 'completion' as texts."
            )
        spans.append((start, _past_end_token(whole, max(start, len(until)), codec)))
    return spans


def _start(chat: Chat, index: int, whole: str, codec: Codec) -> int | None:
    """Behind the generation prompt; behind all that the template writes before the content, if nothing prompts it."""
    try:
        prompt = codec.render(chat.messages[:index], chat.tools, header=True, **chat.options)
        closed = codec.render(chat.messages[:index], chat.tools, **chat.options)
    except InputError:  # no messages, or none that the template would answer
        content = _content(chat, index, whole, codec)
        return None if content is None else len(whole[:content].rstrip(" "))  # a space belongs to the word behind it
    if not whole.startswith(prompt):
        return None
    if prompt == closed:  # the template has no generation prompt; has it a header?
        content = _content(chat, index, whole, codec)
        if content is None or whole[len(prompt) : content].strip():
            return None
    return len(prompt)


def _content(chat: Chat, index: int, whole: str, codec: Codec) -> int | None:
    around = codec.around(chat.messages[: index + 1], index, chat.tools, **chat.options)
    return len(around[0]) if around and whole.startswith(around[0]) else None


def _tagged(chat: Chat, whole: str, codec: Codec) -> list[tuple[int, int]] | None:
    """What the template's generation tags mark of the answers to train; None if they do not tell those apart."""
    spans = codec.generated(chat.messages, chat.tools, **chat.options)
    if not spans or any(end > len(whole) for _, end in spans):
        return None
    spans = [(start, _past_end_token(whole, start + len(whole[start:end].rstrip()), codec)) for start, end in spans]
    answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if len(spans) == len(answers):
        return [span for i, span in zip(answers, spans, strict=True) if i in chat.trained]
    weighted = any(chat.messages[i].get("weight") == 0 for i in answers)
    return None if weighted or answers != chat.trained else spans


def _past_end_token(whole: str, end: int, codec: Codec) -> int:
    """Some templates write the end token when another message follows, and some do not tag it."""
    end_token = codec.tokenizer.eos_token
    return end + len(end_token) if end_token and whole.startswith(end_token, end) else end
