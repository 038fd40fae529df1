"""From messages and text to tokens and back: the same for training rows, contexts and scores.

Tokens of a text depend on what stands before it, and so does the text of tokens: SentencePiece puts a space before
what it takes for a beginning, BPE merges across any border, and a character may lie in several tokens. So text that
goes on is encoded with the end of what it follows in view, and tokens are decoded likewise:

* a text that is appended in pieces reads back as it was written;
* a chat that is appended message by message has the tokens of the whole chat, wherever these have a border between the
  messages. Otherwise, as in raw text that is cut within a word, the tokens that are there stay, and the rest follows in
  tokens of its own.

What begins a text (BOS) stands there once, as in vLLM's server: for text it is what the tokenizer puts before it, for
messages what the chat template writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

from transformers.utils.chat_template_utils import render_jinja_template

from icarus.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
"""``{"role": ..., "content": ...}``, and what else the chat template reads."""

_MARK = "\u241ficarus\u241f"  # stands for a message's content while the chat template is rendered around it
_ANCHORS = ("\n", "a", "0", ".")  # texts that a tokenizer seldom merges with what follows: one of them will do
_WINDOW = 64  # tokens that are looked at before a border; those further back do not change what follows
_TAGGED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BROKEN = "\ufffd"  # what bytes decode to that are not a whole character


class Codec:
    """A tokenizer and its chat template.

    ``after`` in its methods are the tokens that a text follows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer

    # ------------------------------------------------------------------ messages to text

    def render(
        self, messages: Sequence[Message], tools: list[Any] | None = None, *, header: bool = False, **options: Any
    ) -> str:
        """The chat template's text of these messages, which it gets as it does in vLLM's server.

        Args:
            header: add what an answer begins with (the generation prompt).
            options: what else the template reads (TRL's ``chat_template_kwargs``), such as ``enable_thinking``.

        Raises:
            InputError: there is no chat template, or it refuses these messages.
        """
        if not self.tokenizer.chat_template:
            raise InputError("This base model's tokenizer has no chat template; give text instead of messages.")
        given = [_as_served(message) for message in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    given, tools=tools, tokenize=False, add_generation_prompt=header, **options
                )
            )
        except Exception as error:  # templates are programs of their own and raise what they like
            raise InputError(f"The chat template refuses these messages: {first_line(error)}.") from error

    def around(
        self, messages: Sequence[Message], index: int, tools: list[Any] | None = None, **options: Any
    ) -> tuple[str, str] | None:
        """What the template writes before and behind the content of one message; None if it hides or changes it.

        Raises:
            InputError: as ``render``.
        """
        marked = [*messages]
        marked[index] = {**messages[index], "content": _MARK}
        parts = self.render(marked, tools, **options).split(_MARK)
        return (parts[0], parts[1]) if len(parts) == 2 else None

    def generated(
        self, messages: Sequence[Message], tools: list[Any] | None = None, **options: Any
    ) -> list[tuple[int, int]]:
        """Where in the rendered text ``{% generation %}`` tags of the template mark what the assistant says."""
        template = self.tokenizer.get_chat_template(None, tools)
        if not _TAGGED.search(template):
            return []
        rendering: Any = render_jinja_template  # typed as if it gave the text alone
        _, spans = rendering(
            [[_as_served(message) for message in messages]],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **options},
        )
        return list(spans[0])

    # ------------------------------------------------------------------ text to tokens

    def encode(
        self, text: str, *, after: Sequence[int] = (), rendered: bool = False, ending: bool = False
    ) -> list[int]:
        """Tokens of a text that follows ``after``.

        BOS comes before a text that follows nothing, where this tokenizer has it so and the text does not begin with
        it; a ``rendered`` chat brings its own. EOS comes behind it if ``ending``, unless it stands there. Nothing else
        that a tokenizer puts behind a text is added, since every text may go on.

        Raises:
            InputError: the text holds a lone surrogate.
        """
        _refuse_surrogates(text)
        if not text:
            return []
        before = list(after)
        if not before or (before == self.beginning and not rendered):
            ids = self._ids(text)
            ids = ids if before or rendered or ids[: len(self.beginning)] == self.beginning else [*self.beginning, *ids]
        else:
            ids = self._following(text, before)
        end = self.tokenizer.eos_token
        return [*ids, self.tokenizer.eos_token_id] if ending and end and not text.rstrip().endswith(end) else ids

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _following(self, text: str, after: list[int]) -> list[int]:
        """Tokens of ``text`` as they are behind ``after``; where a token would reach over the border, behind an anchor.

        A tokenizer that changes the text itself (to NFC) lets none read back; then the first anchor will do.
        """
        if (ids := self._behind(self._end_of(after), text)) is not None:
            return ids
        candidates = [ids for left in _ANCHORS if (ids := self._behind(left, text)) is not None]
        exact = (ids for ids in candidates if self.decode(ids, after=after, special=True) == text)
        return next(exact, candidates[0] if candidates else self._ids(text))

    def _behind(self, left: str, text: str) -> list[int] | None:
        """The tokens of ``text`` within those of ``left + text``; None if these have no border there."""
        before, both = self._ids(left), self._ids(left + text)
        return both[len(before) :] if both[: len(before)] == before else None

    def _end_of(self, tokens: list[int]) -> str:
        """The text of the last tokens, from the last added token on, since no other token reaches over that."""
        start = max(len(tokens) - _WINDOW, 0)
        start = next((i for i in range(len(tokens) - 1, start, -1) if tokens[i] in self.added), start)
        return self.decode(tokens[start:], after=tokens[:start], special=True)

    # ------------------------------------------------------------------ tokens to text

    def decode(self, tokens: Sequence[int], *, after: Sequence[int] = (), special: bool = False) -> str:
        """Text of tokens that follow ``after``; special tokens are left out unless ``special``."""
        before, text = list(after), ""
        for added, group in groupby(tokens, self.added.__contains__):
            run = list(group)
            if not added:
                text += self._text(run, self._opens(before))
            else:
                text += "".join(self._text([t], t in self.special) for t in run if special or t not in self.special)
            before += run
        return text

    def _text(self, run: list[int], opens: bool) -> str:
        """Text of a run of tokens; if it ``opens`` a text, without the space that the tokenizer puts there."""

        def plain(tokens: list[int]) -> str:
            return str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

        anchor = plain(self._anchor)
        if opens:
            return plain(run).removeprefix(anchor.removesuffix(_ANCHORS[1]))
        return plain([*self._anchor, *run])[len(anchor) :]

    def _opens(self, after: list[int]) -> bool:
        """Whether the tokenizer would put a space of its own before a text that follows these tokens."""
        return not after or after == self.beginning or (self._spaced and after[-1] in self.added)

    def readable(self, tokens: Sequence[int], *, after: Sequence[int] = ()) -> str:
        """As ``decode``, without a last character of which not all bytes are there yet."""
        for missing in range(min(len(tokens), 3) + 1):
            whole = tokens[: len(tokens) - missing]
            text = self.decode(whole, after=after)
            if not text.endswith(_BROKEN) or whole[-1] in self.added or self._wrote_broken(whole):
                return text
        return self.decode(tokens, after=after)  # bytes that will never be a character

    def _wrote_broken(self, tokens: Sequence[int]) -> bool:
        """Whether the last tokens are those of a replacement character that somebody wrote."""
        tails = ([*tokens[-length:]] for length in (1, 2, 3))
        return any(self._following(self._text(tail, opens=False), self._anchor) == tail for tail in tails)

    # ------------------------------------------------------------------ what this tokenizer does

    @cached_property
    def beginning(self) -> list[int]:
        """The tokens that this tokenizer puts before a text: BOS, or nothing."""
        plain, whole = self._anchor, list(self.tokenizer(_ANCHORS[1])["input_ids"])
        starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        return whole[: next(starts, 0)]

    @cached_property
    def added(self) -> frozenset[int]:
        """Tokens that split a text before it is tokenized: the special ones, and others that were added."""
        return frozenset(self.tokenizer.added_tokens_decoder)

    @cached_property
    def special(self) -> frozenset[int]:
        """The added tokens that are no text."""
        return frozenset(i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special)

    @cached_property
    def _anchor(self) -> list[int]:
        return self._ids(_ANCHORS[1])

    @cached_property
    def _spaced(self) -> bool:
        """Whether a space of the tokenizer's own comes behind added tokens too (Llama 2), or at the beginning only."""
        for token in self.special:
            ids = self._ids(self.tokenizer.added_tokens_decoder[token].content + _ANCHORS[1])
            if ids[:1] == [token]:
                return self._text(ids[1:], opens=False) != _ANCHORS[1]
        return False


class Reader:
    """Text of tokens that come one by one behind others, as far as it is readable.

    A character of which some bytes are missing is held back until they are there; the pieces are those of one text.
    """

    def __init__(self, codec: Codec, after: Sequence[int] = ()) -> None:
        self.text = ""
        """All that was readable so far."""
        self._codec, self._tokens = codec, [*after]
        self._start = self._shown = 0
        self._look_back()

    def push(self, token: int) -> str:
        """The text that this token makes readable."""
        self._tokens.append(token)
        new = self._readable(self._start)[self._shown :]
        self._shown += len(new)
        self.text += new
        if new and len(self._tokens) - self._start > 2 * _WINDOW:
            self._look_back()
        return new

    def _look_back(self) -> None:
        """Begin with the last tokens only, where a character begins; what they say has been shown."""
        start = max(len(self._tokens) - _WINDOW, 0)
        places = range(start, max(start - 4, -1), -1)
        self._start = next((at for at in places if not self._readable(at).startswith(_BROKEN)), start)
        self._shown = len(self._readable(self._start))

    def _readable(self, start: int) -> str:
        return self._codec.readable(self._tokens[start:], after=self._tokens[max(0, start - _WINDOW) : start])


def _as_served(message: Message) -> dict[str, Any]:
    """A message as vLLM's server hands it to the template (vllm/renderers/chat_utils.py).

    What is null is left out, content that is left out is empty text, a call's arguments are an object and not its JSON
    text, an empty list of calls is none, and ``reasoning`` has the name that templates use as well. ``weight`` is for
    training alone.
    """
    given = {key: value for key, value in message.items() if key != "weight" and value is not None}
    given.setdefault("content", "")
    if calls := given.pop("tool_calls", None):
        if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
            raise InputError(f"'tool_calls' of a message must be a list of objects, not {calls!r:.80}.")
        given["tool_calls"] = [_call(call) for call in calls]
    if "reasoning" in given:
        given.setdefault("reasoning_content", given["reasoning"])
    return given


def _call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(call.get("function"), Mapping):
        return call
    arguments = call["function"].get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise InputError(
                f"The arguments of a tool call are not JSON ({error.msg} at column {error.colno}): {arguments!r:.80}."
            ) from error
    if not isinstance(arguments, Mapping):
        raise InputError(f"The arguments of a tool call must be an object, not {arguments!r:.80}.")
    return {**call, "function": {**call["function"], "arguments": arguments}}


def end_tokens(generation_config: Any) -> list[int]:
    """Ids of the tokens at which a model's generation stops (``eos_token_id``: an id, several, or none)."""
    ends = getattr(generation_config, "eos_token_id", None)
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def surrogates(value: Any) -> Iterator[str]:
    """The lone surrogates in a text, or in all texts of lists and objects; JSON can spell them, UTF-8 cannot."""
    if isinstance(value, str):
        yield from (c for c in value if "\ud800" <= c <= "\udfff")
    elif isinstance(value, Mapping):
        for item in value.items():
            yield from surrogates(list(item))
    elif isinstance(value, list):
        for item in value:
            yield from surrogates(item)


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"The text has a lone surrogate ({text[error.start]!a} at character {error.start + 1}), which is not text; "
            "remove it."
        ) from error
