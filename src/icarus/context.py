"""One KV cache, many specialists: append, generate, switch, fork, roll back, score.

A ``Specialists`` is a base model with its adapters; a ``Context`` is one token sequence with its one KV cache, in which
they take turns. Whoever speaks, the base weights write the K/V, so the next speaker finds everything in place.

A token is encoded when a prediction first needs it: ``append`` only notes it down, and the last token goes through
encoder and decoder in one pass (``TwoStreams.step``).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from icarus import adapter as adapters
from icarus import base_model, model_length, packaged_model
from icarus.chat_template import Codec, Message, Reader, end_tokens, surrogates
from icarus.errors import InputError
from icarus.streams import EncoderCache, TwoStreams

BASE = "base"
"""The name under which the base model itself speaks."""

_DEFAULT_NEW_TOKENS = 20  # Transformers', where no length is given


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one ``generate`` did. Token counts are positions; ``kv_bytes`` is what the context holds afterwards."""

    model: str
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    encoded_tokens: int
    """Positions whose K/V were computed in this turn."""
    cached_tokens: int
    """Positions that it found in the cache, whichever speaker they were encoded for."""
    kv_bytes: int
    seconds: float

    @property
    def reused_tokens(self) -> int:
        """The former name of ``cached_tokens``; it goes with version 0.3."""
        _deprecated("Turn.reused_tokens", "read Turn.cached_tokens")
        return self.cached_tokens


@dataclass
class _State:
    """A context's place in a chat: the messages it holds, and where an answer begins that is still open.

    An open answer is the last message; its text is that of the tokens from ``answer`` on.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    answer: int | None = None

    def copy(self) -> _State:
        return _State([dict(m) for m in self.messages], self.answer)


class Specialists:
    """A base model, its tokenizer and its named adapters.

    >>> team = Specialists.load("owner/base", {"sql": "path/to/adapter"})    # doctest: +SKIP
    >>> team.context().append("SELECT").generate("sql").text                 # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.codec = Codec(tokenizer)
        self.streams = TwoStreams(self.model)
        self._fingerprint = ""  # of the base model, once an adapter asks for it

    @classmethod
    def load(
        cls,
        base: str = packaged_model.PACKAGED,
        specialists: Mapping[str, str | Path] | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
    ) -> Specialists:
        """Load a base model (Hub id, folder, or the packaged one) and adapters given as name -> folder or Hub id."""
        team = cls(*base_model.load(base, dtype=dtype, device=device))
        for name, source in (specialists or {}).items():
            team.add(name, source)
        return team

    def add(self, name: str, source: str | Path) -> None:
        """Attach a verified adapter, or replace the one of that name; running contexts keep their cache.

        Raises:
            AdapterError: the adapter must not share a cache with this base model; nothing has changed.
            InputError: the name is the base model's.
        """
        if name == BASE:
            raise InputError(f"An adapter cannot be named {BASE!r}: that is the base model; choose another name.")
        self._fingerprint = self._fingerprint or adapters.fingerprint(self.model)
        self.model = adapters.load(self.model, source, name, base_fingerprint=self._fingerprint).eval()
        self.streams = TwoStreams(self.model)

    @property
    def names(self) -> list[str]:
        """Who can speak: the base model first, then the adapters."""
        return [BASE, *(adapters.names(self.model) if hasattr(self.model, "peft_config") else [])]

    def adapter(self, name: str) -> str | None:
        """The adapter behind a speaker's name; None for the base model.

        Raises:
            InputError: nobody has that name.
        """
        if name not in self.names:
            raise InputError(f"No specialist named {name!r}; there are {', '.join(self.names)}.")
        return None if name == BASE else name

    def context(self, *, parallel: bool = True) -> Context:
        """A new, empty context. ``parallel=False`` runs encoder and decoder rows in passes of their own."""
        return Context(self, parallel=parallel)


class Context:
    """One token sequence and its one KV cache. Not safe to use from two threads at once."""

    def __init__(self, team: Specialists, *, parallel: bool = True) -> None:
        self.team, self.parallel = team, parallel
        self.token_ids: list[int] = []
        self.encoded_tokens = 0
        """Positions encoded so far, in all turns together."""
        self._reused_tokens = 0  # all turns' cached_tokens together
        self._cache = EncoderCache()
        self._state = _State()
        self._journal: list[tuple[int, _State]] = []

    # ------------------------------------------------------------------ what it holds

    @property
    def kv_bytes(self) -> int:
        """Bytes of K/V held for this context."""
        return self._cache.bytes

    @property
    def length(self) -> int:
        """Positions whose K/V are in the cache; the rest of the tokens is encoded when a prediction needs it."""
        return self._cache.length

    @property
    def cached_tokens(self) -> int:
        """The former name of ``length``; it goes with version 0.3.

        It keeps that meaning until it goes, though ``Turn.cached_tokens`` is another count: what a turn found.
        """
        _deprecated("Context.cached_tokens", "read Context.length")
        return self.length

    @property
    def reused_tokens(self) -> int:
        """What turns found in the cache, summed over turns; it goes with version 0.3."""
        _deprecated("Context.reused_tokens", "add up Turn.cached_tokens")
        return self._reused_tokens

    @property
    def text(self) -> str:
        """The whole sequence as text, special tokens included."""
        return self.team.codec.decode(self.token_ids, special=True)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The chat so far, generated answers included."""
        messages = self._state.copy().messages
        if self._state.answer is not None:
            begin = self._state.answer
            messages[-1]["content"] = self.team.codec.decode(self.token_ids[begin:], after=self.token_ids[:begin])
        return messages

    # ------------------------------------------------------------------ what can be put in

    def append(self, content: str | Sequence[Message] | Iterable[int] | Tensor) -> Context:
        """Append text, chat messages (``{"role", "content"}``) or token ids. Returns the context itself.

        Text reads back as it was written, in pieces too. Its tokens are those of the whole text where these have a
        border between the pieces; tokens that are there already never change.

        Raises:
            InputError: not text, messages or token ids; or the chat template refuses or would rewrite messages.
        """
        if isinstance(content, str):
            return self._extend(self.team.codec.encode(content, after=self.token_ids))
        if isinstance(content, Mapping) or not isinstance(content, Iterable):
            raise InputError(f"{content!r} cannot be appended; give text, a list of messages, or token ids.")
        items: list[Any] = content.flatten().tolist() if isinstance(content, Tensor) else list(content)
        if items and isinstance(items[0], Mapping):
            return self._append_messages([_checked(message) for message in items])
        vocabulary = self.team.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        for token in items:
            if not isinstance(token, Integral) or isinstance(token, bool) or not 0 <= int(token) < vocabulary:
                raise InputError(
                    f"{token!r} is not a token id of this model; give integers from 0 to {vocabulary - 1}."
                )
        return self._extend([int(token) for token in items])

    def rollback(self, length: int) -> Context:
        """Forget everything behind the first ``length`` tokens; what stays in the cache is not computed again.

        Raises:
            InputError: ``length`` is negative or beyond the end.
        """
        if not 0 <= length <= len(self.token_ids):
            raise InputError(f"Cannot roll back to {length} tokens; this context has {len(self.token_ids)}.")
        end = len(self.token_ids)
        del self.token_ids[length:]
        self._cache.truncate(length)
        while self._journal and self._journal[-1][0] >= length:
            end, self._state = self._journal.pop()
        if self._journal and end > length:  # into the middle of an entry, which stays for further rollbacks
            self._state = self._journal[-1][1].copy()
        return self

    def fork(self) -> Context:
        """A second context with the same tokens and cache; the two then continue apart. Nothing is copied yet."""
        twin = Context(self.team, parallel=self.parallel)
        twin.token_ids = list(self.token_ids)
        twin._cache, twin._state = self._cache.fork(), self._state.copy()
        twin._journal = [(start, state.copy()) for start, state in self._journal]
        return twin

    # ------------------------------------------------------------------ what comes out

    def generate(
        self,
        model: str = BASE,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        stream: Callable[[str], None] | None = None,
        generation_config: GenerationConfig | None = None,
    ) -> Turn:
        """Let a specialist (or ``"base"``) continue the context, also in mid-sentence.

        Args:
            max_new_tokens: at most so many tokens; ``finish_reason`` tells whether that ended the turn.
            temperature: 0 is greedy; sampling with ``top_p``, ``top_k`` (0: all) and ``seed`` otherwise.
            stop: texts that end the turn; they stay in the context but not in ``Turn.text``.
            stream: called with each piece of text as it becomes readable.
            generation_config: a GenerationConfig instead of the options above (all but beam search).

        Raises:
            InputError: unknown specialist, empty or full context, an option out of range, or options beside a
                ``generation_config``.
        """
        speaker = self.team.adapter(model)
        config = generation_config or _config(max_new_tokens, temperature, top_p, top_k, stop)
        if generation_config and (max_new_tokens, temperature, top_p, top_k, stop) != (256, 0.0, 1.0, 0, None):
            raise InputError("Options beside a generation_config would be ignored; put them into it.")
        if seed is not None and not 0 <= seed < 2**63:
            raise InputError(f"seed is {seed}; give 0 or more and less than 2**63.")
        _refuse_beams(config)
        if not self.token_ids:
            raise InputError("The context is empty; append text, messages or tokens before generating.")
        started, origin, cached = time.perf_counter(), len(self.token_ids), self.length
        try:
            if self._state.messages and self._state.answer is None:
                self._open_answer()
            before = len(self.token_ids)
            config = self._within_model_length(config)
            self._journal.append((before, self._state.copy()))
            text = TurnText(Reader(self.team.codec, self.token_ids), stream, _stops(config.stop_strings))
            self._run(speaker, config, seed, text)
        except BaseException:
            self.rollback(origin)
            raise
        new = self.token_ids[before:]
        stopped = text.end is not None
        self._reused_tokens += cached
        return Turn(
            model=model,
            text=text.whole[: text.end],
            token_ids=new,
            finish_reason="stop" if stopped or new[-1] in self._ends(config) else "length",
            encoded_tokens=self.length - cached,
            cached_tokens=cached,
            kv_bytes=self.kv_bytes,
            seconds=time.perf_counter() - started,
        )

    def score(self, text: str, models: Sequence[str] | None = None) -> dict[str, list[float]]:
        """Log-probability of each token of ``text`` behind this context, under each model; the context is unchanged.

        ``text`` is encoded once for all of them. The base model's figures are the encoder's by-product.

        Raises:
            InputError: unknown specialist, empty context, or empty text.
        """
        names = list(models or self.team.names)
        speakers = {name: self.team.adapter(name) for name in names}
        tokens = self.team.codec.encode(text, after=self.token_ids)
        if not tokens or not self.token_ids:
            raise InputError("Scoring needs a non-empty context and a non-empty text.")
        with torch.no_grad():
            return self._score(tokens, speakers)

    # ------------------------------------------------------------------ prediction

    def _run(self, speaker: str | None, config: GenerationConfig, seed: int | None, text: TurnText) -> None:
        """Transformers prepares logits processors and stopping criteria from the config and calls our loop."""
        model = self._causal_lm()
        generator = torch.Generator(model.device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
        # Transformers 5.19 loses the tokenizer that its own stop-string check needs when generate() gets a loop.
        prepared = copy(config)
        prepared.stop_strings = None

        def loop(
            model: Any,
            input_ids: Tensor,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: GenerationConfig,  # ours, and the model's own where ours leaves something open
            **_: Any,
        ) -> Tensor:
            done = False
            while not done:
                scores = logits_processor(input_ids, self._next_logits(speaker).float())
                token = _pick(scores, generation_config.do_sample, generator)
                self.token_ids.append(int(token))
                text.push(int(token))
                input_ids = torch.cat([input_ids, token.view(1, 1)], dim=1)
                done = bool(stopping_criteria(input_ids, None).all()) or text.end is not None
            return input_ids

        with torch.no_grad():
            model.generate(
                torch.tensor([self.token_ids], device=model.device),
                attention_mask=torch.ones(1, len(self.token_ids), dtype=torch.long, device=model.device),
                generation_config=prepared,
                custom_generate=loop,
            )
        text.flush()

    def _within_model_length(self, config: GenerationConfig) -> GenerationConfig:
        """The turn ends at the model's last position at the latest: beyond it, answers are nonsense."""
        limit, length = model_length.max_length(self.team.streams.config), len(self.token_ids)
        if limit is None:
            return config
        if length >= limit:
            raise InputError(f"The context has {length} tokens and this model takes {limit}; roll it back.")
        config = copy(config)
        if config.max_new_tokens is not None:
            config.max_new_tokens = min(config.max_new_tokens, limit - length)
        elif (config.max_length or self._default_max_length() or length + _DEFAULT_NEW_TOKENS) > limit:
            config.max_length = limit
        return config

    def _default_max_length(self) -> int | None:
        """Of a turn whose config has no length: the model's own."""
        own: Any = getattr(self.team.streams.model, "generation_config", None)
        return getattr(own, "max_length", None)

    def _next_logits(self, speaker: str | None) -> Tensor:
        """(1, V) logits behind the last token, which encodes what is not encoded yet."""
        if self._cache.length == len(self.token_ids):
            return self.team.streams.decode(self._ids(-1), self._cache, speaker)[:, -1]
        if speaker is None:
            return self._encode(len(self.token_ids))[:, -1]
        self._encode(len(self.token_ids) - 1)
        self.encoded_tokens += 1
        return self.team.streams.step(self._ids(-1), self._cache, speaker, parallel=self.parallel)[0]

    def _encode(self, end: int, logits_to_keep: int = 1) -> Tensor:
        """Write the K/V up to position ``end``; base logits of the last positions."""
        start = self._cache.length
        if end <= start:
            return torch.empty(0)
        self.encoded_tokens += end - start
        return self.team.streams.encode(self._ids(start, end), self._cache, logits_to_keep=logits_to_keep)

    def _score(self, tokens: list[int], speakers: dict[str, str | None]) -> dict[str, list[float]]:
        before, cached, counted = len(self.token_ids), self._cache.length, self.encoded_tokens
        base = []
        if cached == before:  # the last token was encoded in an earlier turn: its prediction is one decoder row
            base.append(self.team.streams.decode(self._ids(-1), self._cache, None))
        self.token_ids.extend(tokens)
        try:
            end = before - 1 + len(tokens)
            rows = self._ids(before - 1, end)
            if end > self._cache.length:
                base.append(self._encode(end, logits_to_keep=min(len(tokens), end - cached)))
            logits = {
                name: torch.cat(base, 1) if speaker is None else self.team.streams.decode(rows, self._cache, speaker)
                for name, speaker in speakers.items()
            }
        finally:
            del self.token_ids[before:]
            self._cache.truncate(before)
            self.encoded_tokens = counted + self._cache.length - cached
        wanted = torch.tensor(tokens, device=rows.device)[:, None]
        return {name: v[0].float().log_softmax(-1).gather(1, wanted)[:, 0].tolist() for name, v in logits.items()}

    def _causal_lm(self) -> Any:
        model: Any = self.team.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _ids(self, start: int, end: int | None = None) -> Tensor:
        return torch.tensor([self.token_ids[start:end]], device=self._causal_lm().device)

    # ------------------------------------------------------------------ text and chat

    def _extend(self, tokens: list[int], after: _State | None = None) -> Context:
        """Add tokens and pass to the state ``after`` them; tokens without one are part of an open answer, or text."""
        if tokens or after:  # some templates write nothing before an answer
            self._journal.append((len(self.token_ids), self._state))
            self.token_ids.extend(tokens)
            self._state = after or self._state.copy()
        return self

    def _append_messages(self, new: list[dict[str, Any]]) -> Context:
        tokens = self.team.codec.encode(self._rendered_suffix(new), after=self.token_ids, rendered=True)
        begin = self.team.codec.beginning
        if not self._state.messages and self.token_ids[: len(begin)] == begin == tokens[: len(begin)]:
            tokens = tokens[len(begin) :]  # the chat comes behind text, which has brought it
        return self._extend(tokens, _State([*self.messages, *new]))

    def _rendered_suffix(self, new: list[dict[str, Any]]) -> str:
        """What the chat template puts behind the present end for these messages; earlier text is never rewritten."""
        codec, messages = self.team.codec, self._state.messages
        if self._state.answer is not None:
            return self._rendered_behind_answer(new)
        before, after = codec.render(messages) if messages else "", codec.render([*messages, *new])
        if not after.startswith(before):
            raise InputError("The chat template rewrites earlier messages; append text or tokens instead.")
        return after[len(before) :]

    def _rendered_behind_answer(self, new: list[dict[str, Any]]) -> str:
        messages, last = self._state.messages, self.token_ids[-1]
        around = self.team.codec.around([*messages, *new], len(messages) - 1)
        if around is None:
            raise InputError("The chat template changes the text of an answer; append text or tokens instead.")
        if last in {*self._ends(), *self.team.tokenizer.all_special_ids}:  # the answer has closed itself
            end = self.team.codec.decode([last], special=True)
            if around[1].lstrip().startswith(end):
                return around[1].lstrip().removeprefix(end)
        return around[1]

    def _open_answer(self) -> None:
        codec, messages = self.team.codec, self._state.messages
        whole, closed = codec.render(messages, header=True), codec.render(messages)
        if not whole.startswith(closed):
            raise InputError("The chat template has no header for an answer; append text or tokens instead.")
        tokens = codec.encode(whole[len(closed) :], after=self.token_ids, rendered=True)
        answer = {"role": "assistant", "content": ""}
        self._extend(tokens, _State([*self.messages, answer], len(self.token_ids) + len(tokens)))

    def _ends(self, config: GenerationConfig | None = None) -> list[int]:
        """Token ids that end an answer."""
        own = config is not None and config.eos_token_id is not None
        return end_tokens(config if own else self._causal_lm().generation_config)


class TurnText:
    """What a speaker says in a turn: its text, where a stop string ends it, and what a listener may hear of it yet.

    What may be the beginning of a stop string is held back from the listener.
    """

    def __init__(self, reader: Reader, listener: Callable[[str], None] | None, stops: Sequence[str]) -> None:
        self.end: int | None = None
        """Where the first stop string begins, once there is one."""
        self._reader, self._listener, self._stops = reader, listener, stops
        self._held = max(map(len, stops), default=1) - 1
        self._heard = 0

    @property
    def whole(self) -> str:
        return self._reader.text

    def push(self, token: int) -> None:
        searched = max(0, len(self.whole) - self._held)
        if self._reader.push(token):
            places = [self.whole.find(stop, searched) for stop in self._stops]
            self.end = min((place for place in places if place >= 0), default=None)
            self._tell(len(self.whole) - self._held)

    def flush(self) -> None:
        """The turn is over: nothing is held back any more."""
        self._tell(len(self.whole))

    def _tell(self, until: int) -> None:
        until = until if self.end is None else min(until, self.end)
        if self._listener and until > self._heard:
            self._listener(self.whole[self._heard : until])
            self._heard = until


def _deprecated(name: str, instead: str) -> None:
    warnings.warn(f"{name} goes with version 0.3; {instead} instead.", DeprecationWarning, stacklevel=3)


def _config(
    max_new_tokens: int, temperature: float, top_p: float, top_k: int, stop: str | Sequence[str] | None
) -> GenerationConfig:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; give at least 1.")
    if not 0 <= temperature < float("inf") or not 0 < top_p <= 1 or top_k < 0:
        raise InputError(
            f"temperature={temperature}, top_p={top_p}, top_k={top_k}: "
            "give temperature >= 0, 0 < top_p <= 1, top_k >= 0."
        )
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    chosen: dict[str, Any] = sampling if temperature > 0 else {"do_sample": False}
    stops = _stops(stop)
    if "" in stops:
        raise InputError(f"stop={stop!r} holds an empty text, which would end every turn; leave it out.")
    if next(surrogates(stops), None):
        raise InputError(f"stop={stop!a} holds a lone surrogate, which no text has; leave it out.")
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens, stop_strings=stops or None, **chosen
    )


def _stops(stop: str | Sequence[str] | None) -> list[str]:
    return [stop] if isinstance(stop, str) else list(stop or ())


def _refuse_beams(config: GenerationConfig) -> None:
    if (config.num_beams or 1) > 1 or (config.num_return_sequences or 1) > 1:
        raise InputError("Beam search and num_return_sequences need several sequences; fork the context instead.")


def _pick(scores: Tensor, sample: bool | None, generator: torch.Generator) -> Tensor:
    if sample:
        return torch.multinomial(scores.softmax(-1), 1, generator=generator)[0]
    return scores.argmax(-1)


def _checked(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(f"{message!r} is not a chat message; give {{'role': ..., 'content': ...}}.")
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise InputError(f"The message {message!r} has no text in 'content'.")
    return {**message, "content": content or ""}
