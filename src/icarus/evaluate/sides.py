"""Who answers: the base model, conventional adapters as PEFT runs them, ICaRus adapters in two streams.

All share one base model in memory: an adapter is attached while its side answers, and taken off again. The marker in an
adapter's config says of which kind it is, so none is run as the other.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList

from icarus import adapter as adapters
from icarus import base_model, model_length, packaged_model
from icarus.chat_template import Codec
from icarus.context import BASE
from icarus.errors import InputError, UnsupportedModelError
from icarus.evaluate.generated import Answer, Answers
from icarus.streams import IGNORED, Batch, EncoderCache, TwoStreams

Kind = Literal["base", "conventional", "icarus"]
Watch = Callable[[Tensor, Tensor, Tensor | None], None]
"""Takes all tokens (B, T) so far and the logits (B, V) behind the last one: this side's, and those of the base model if
they come with them."""
Past = Any
"""K/V of tokens that were read: a Transformers cache, or an ``EncoderCache``; None where there are none."""
Step = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Takes all tokens (B, T) so far and reads the new ones; gives what a ``Watch`` takes."""

_BLOCK = 32  # tokens between two looks at the base model: PEFT takes longer to take an adapter off than a token takes


@dataclass(frozen=True)
class TokenRow:
    """Token ids, and labels that equal them where a token is to be predicted, else -100 (as training has them)."""

    input_ids: Sequence[int]
    labels: Sequence[int]


@dataclass(frozen=True)
class Scored:
    """What a side makes of the tokens of a row that are to be predicted."""

    log_probabilities: list[float]
    """Of each of them, natural logarithms."""
    greedy: bool
    """Whether each of them is the most likely one."""


class Side(ABC):
    """One side of a comparison, over batches. Greedy; rows of a batch are padded on the left."""

    kind: Kind

    def __init__(self, model: nn.Module, codec: Codec) -> None:
        self.model: Any = model
        self.codec = codec
        self.causal_lm: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]

    @property
    def max_length(self) -> int | None:
        """The longest text in tokens, prompt and answer."""
        return model_length.max_length(self.causal_lm.config.get_text_config())

    @torch.no_grad()
    def score(self, rows: Sequence[TokenRow]) -> list[Scored]:
        """Log-probability of each token that is to be predicted."""
        return _scored(*self._predictions(self._batch(rows)))

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[Answer]:
        """The answers behind prompts of one or more tokens each, as a ``Context`` or PEFT's ``generate`` gives them.

        An answer ends with the model's or the tokenizer's end token, before a text of ``stop``, after
        ``max_new_tokens``, or at the model's last position.
        """
        if len(prompts) > 1 and not self._holds(max(map(len, prompts)) + max_new_tokens):
            return [one for p in prompts for one in self.generate([p], max_new_tokens=max_new_tokens, stop=stop)]
        return self._answers(prompts, self._batch(_without_labels(prompts)), None, max_new_tokens, stop)

    @torch.no_grad()
    def answer(
        self, rows: Sequence[TokenRow], *, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[tuple[Scored, Answer]]:
        """``score`` of each row, and ``generate`` behind its prompt: the tokens before the first label, one or more.

        Each prompt is read once for both.
        """
        prompts = [_prompt(row) for row in rows]
        if not self._fit(rows, max_new_tokens):
            answers = self.generate(prompts, max_new_tokens=max_new_tokens, stop=stop)
            return list(zip(self.score(rows), answers, strict=True))
        batch = self._batch(_without_labels(prompts))
        past = self._read(batch)
        scored = self._score_behind(past, batch, rows)
        return list(zip(scored, self._answers(prompts, batch, past, max_new_tokens, stop), strict=True))

    @torch.no_grad()
    def choose(self, choices: Sequence[Sequence[TokenRow]]) -> list[list[Scored]]:
        """``score`` of each item's choices, one or more; a prompt that all of an item share is read once."""
        rows = [row for own in choices for row in own]
        prompts = [_prompt(own[0]) for own in choices]
        same = all(_prompt(row) == prompt for own, prompt in zip(choices, prompts, strict=True) for row in own)
        if not same or not self._fit(rows):
            size = len(choices)
            scored = [one for start in range(0, len(rows), size) for one in self.score(rows[start : start + size])]
            return [[scored.pop(0) for _ in own] for own in choices]
        batch = self._batch(_without_labels(prompts))
        past = self._read(batch)
        columns = [  # an item with fewer choices repeats its last one
            self._score_behind(past, batch, [own[min(index, len(own) - 1)] for own in choices])
            for index in range(max(map(len, choices)))
        ]
        return [[columns[index][item] for index in range(len(own))] for item, own in enumerate(choices)]

    def _fit(self, rows: Sequence[TokenRow], new: int = 0) -> bool:
        """Whether a batch with these prompts stays within the model's positions, its padding included."""
        after = max(len(row.input_ids) - _start(row) for row in rows)
        return self._holds(max(_start(row) for row in rows) + max(after, new))

    def _holds(self, tokens: int) -> bool:
        """Whether the model has as many positions. Learned ones end there."""
        return not self.max_length or tokens <= self.max_length

    def _score_behind(self, past: Past, prompts: Batch, rows: Sequence[TokenRow]) -> list[Scored]:
        """Scores of rows whose prompts are read; what follows the prompts is padded on the right."""
        width = max(len(row.input_ids) - _start(row) for row in rows)

        def after(values: Sequence[int], start: int, filler: int) -> list[int]:
            return [*values[start:], *[filler] * (start + width - len(values))]

        ids, targets = (
            torch.tensor(column, device=self.causal_lm.device)
            for column in (
                [after(row.input_ids, _start(row), self._padding) for row in rows],
                [after(row.labels, _start(row), IGNORED) for row in rows],
            )
        )
        logits = self._follow(past, torch.cat([prompts.input_ids[:, -1:], ids[:, :-1]], dim=1), _mask(prompts))
        return _scored(logits, targets)

    def _answers(
        self, prompts: Sequence[Sequence[int]], batch: Batch, past: Past, max_new_tokens: int, stop: Sequence[str]
    ) -> list[Answer]:
        limits = [
            max_new_tokens if not self.max_length else min(max_new_tokens, self.max_length - len(p)) for p in prompts
        ]
        answers = Answers(self.codec, prompts, limits, self._ends(), stop)
        comparison = self._comparison(_mask(batch), answers)
        self.causal_lm.generate(
            batch.input_ids,
            attention_mask=_mask(batch),
            generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
                do_sample=False,
                num_beams=1,
                num_return_sequences=1,
                max_new_tokens=max(limits),
                pad_token_id=self._padding,
            ),
            stopping_criteria=StoppingCriteriaList([answers]),
            **self.generation(_mask(batch), comparison, past),
        )
        if comparison:
            comparison.finish()
        return answers.finished()

    @abstractmethod
    def _predictions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (B, R, V) for the targets (B, R) of a batch; -100 pads."""

    def _read(self, batch: Batch) -> Past:
        """The K/V of a batch, but for the last token of each row."""
        return self._cache(batch) if batch.input_ids.shape[1] > 1 else None

    @abstractmethod
    def _cache(self, batch: Batch) -> Past:
        """``_read`` of rows that have tokens before the last one."""

    @abstractmethod
    def _follow(self, past: Past, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, R, V) behind each of the tokens (B, R), the first of which is the mask's (B, T) last.

        ``past`` stays as it is.
        """

    @abstractmethod
    def _steps(self, mask: Tensor, past: Past) -> Step:
        """Of a generation behind tokens (B, T), whose mask tells them from padding; it writes behind ``past``."""

    @abstractmethod
    def _comparison(self, mask: Tensor, answers: Answers) -> _Comparison | None:
        """What compares a generation with the base model's; None if this is the base model."""

    def generation(self, mask: Tensor, watch: Watch | None = None, past: Past = None) -> dict[str, Any]:
        """What Transformers' ``generate`` needs to run this side; the mask (B, T) tells tokens from padding.

        ``past`` holds the K/V of all tokens but the last; it is written behind.
        """

        def loop(model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, **_: Any) -> Tensor:
            step, done = self._steps(mask, past), False
            while not done:
                logits, base = step(input_ids)
                if watch:
                    watch(input_ids, logits, base)
                token = logits_processor(input_ids, logits.float()).argmax(-1)
                input_ids = torch.cat([input_ids, token[:, None]], dim=1)
                done = bool(stopping_criteria(input_ids, None).all())
            return input_ids

        return {"custom_generate": loop}

    @property
    def _padding(self) -> int:
        """Any token will do, as no one attends to it."""
        return int(self.codec.tokenizer.eos_token_id or 0)

    def _ends(self) -> frozenset[int]:
        own = self.causal_lm.generation_config.eos_token_id
        ends = [own] if isinstance(own, int) else own or []
        return frozenset(end for end in (*ends, self.codec.tokenizer.eos_token_id) if end is not None)

    def _batch(self, rows: Sequence[TokenRow]) -> Batch:
        width = max(len(row.input_ids) for row in rows)

        def padded(values: Sequence[int], filler: int) -> list[int]:
            return [filler] * (width - len(values)) + list(values)

        ids, labels, mask = (
            torch.tensor(column, device=self.causal_lm.device)
            for column in (
                [padded(row.input_ids, self._padding) for row in rows],
                [padded(row.labels, IGNORED) for row in rows],
                [padded([1] * len(row.input_ids), 0) for row in rows],
            )
        )
        return Batch.of(ids, labels, mask)


class Plain(Side):
    """The base model, or a conventional adapter as PEFT runs it."""

    def __init__(self, model: nn.Module, codec: Codec, kind: Kind) -> None:
        super().__init__(model, codec)
        self.kind = kind

    def _predictions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        rows, targets = batch.rows_with_loss()
        first = int(rows[targets != IGNORED].min()) if bool((targets != IGNORED).any()) else 0
        logits = self.model(
            input_ids=batch.input_ids,
            attention_mask=_mask(batch),
            position_ids=batch.position_ids,
            logits_to_keep=torch.arange(
                first, batch.input_ids.shape[1], device=self.causal_lm.device
            ),  # no gaps: see streams
            use_cache=False,
        ).logits
        places = (rows - first).clamp(min=0)  # those of the padding are anywhere
        return logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1])), targets

    def _cache(self, batch: Batch) -> Past:
        reader = _Reader(self.model, _mask(batch))
        reader(batch.input_ids[:, :-1])
        return reader.past

    def _follow(self, past: Past, ids: Tensor, mask: Tensor) -> Tensor:
        reader = _Reader(self.model, mask, copy.deepcopy(past))  # that of a sliding window cannot be cut back
        return reader.logits(ids)

    def _steps(self, mask: Tensor, past: Past) -> Step:
        reader = _Reader(self.model, mask, past)
        return lambda input_ids: (reader(input_ids), None)

    def _comparison(self, mask: Tensor, answers: Answers) -> _Comparison | None:
        return None if self.kind == "base" else _ComparisonInBlocks(self.model, mask, answers)


class _Reader:
    """A Transformers model that reads tokens behind those that it has read.

    Args:
        mask: (B, T) of the first tokens; 0 is padding, which only stands before them.
        past: the K/V of all these but the last.
    """

    def __init__(self, model: Any, mask: Tensor, past: Past = None) -> None:
        self.model, self.mask, self.past = model, mask, past
        self.count = 0 if past is None else mask.shape[1] - 1

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits (B, V) behind the last of all tokens (B, T) so far."""
        return self.logits(input_ids[:, self.count :], keep=1)[:, -1]

    def logits(self, new: Tensor, *, keep: int = 0) -> Tensor:
        """Logits (B, R, V) behind each of the new tokens (B, R), or behind the last ``keep`` of them."""
        self.count += new.shape[1]
        width = self.mask.shape[1]
        mask = F.pad(self.mask, (0, max(self.count - width, 0)), value=1)[:, : self.count]
        kept = torch.arange(new.shape[1], device=new.device)  # numbers would copy lm_head: see streams
        out = self.model(
            input_ids=new,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :],
            past_key_values=self.past,
            logits_to_keep=kept[-keep:],
            use_cache=True,
        )
        self.past = getattr(out, "past_key_values", None)
        if self.past is None:
            kind = self.model.config.model_type
            raise UnsupportedModelError(
                f"{kind} has no KV cache (past_key_values); evaluate a Transformer that has one."
            )
        logits: Tensor = out.logits
        return logits


class _Comparison:
    """Takes what a generation is watched by, and tells the answers how far the base model is."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers

    def __call__(self, input_ids: Tensor, logits: Tensor, base: Tensor | None) -> None:
        assert base is not None
        self.answers.compare(logits[:, None], base[:, None])

    def finish(self) -> None:
        """What is left at the end of the generation."""


class _ComparisonInBlocks(_Comparison):
    """The base model reads what a conventional adapter generated, block by block, with a KV cache of its own."""

    def __init__(self, model: Any, mask: Tensor, answers: Answers) -> None:
        super().__init__(answers)
        self.model, self.reader = model, _Reader(model, mask)
        self.logits: list[Tensor] = []
        self.input_ids: Tensor

    def __call__(self, input_ids: Tensor, logits: Tensor, base: Tensor | None) -> None:
        self.input_ids = input_ids
        self.logits.append(logits)
        if len(self.logits) == _BLOCK:
            self.finish()

    def finish(self) -> None:
        if self.logits:
            with self.model.disable_adapter():
                base = self.reader.logits(self.input_ids[:, self.reader.count :], keep=len(self.logits))
            self.answers.compare(torch.stack(self.logits, dim=1), base)
            self.logits.clear()


class TwoStream(Side):
    """An ICaRus adapter: base weights write the K/V, the adapter's decoder reads them."""

    kind = "icarus"

    def __init__(self, model: nn.Module, codec: Codec, name: str) -> None:
        super().__init__(model, codec)
        self.name, self.streams = name, TwoStreams(model)

    def _predictions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        self.streams.lora.activate(self.name)
        _, logits, targets = self.streams.loss(batch)
        return logits, targets

    def _cache(self, batch: Batch) -> EncoderCache:
        cache = EncoderCache(padding=_padding(_mask(batch)))
        self.streams.encode(batch.input_ids[:, :-1], cache)
        return cache

    def _follow(self, past: Past, ids: Tensor, mask: Tensor) -> Tensor:
        cache = EncoderCache(padding=_padding(mask)) if past is None else past
        length = cache.length
        self.streams.encode(ids, cache)
        logits = self.streams.decode(ids, cache, self.name)
        cache.truncate(length)
        return logits

    def _steps(self, mask: Tensor, past: Past) -> Step:
        cache = EncoderCache(padding=_padding(mask)) if past is None else past

        def step(input_ids: Tensor) -> tuple[Tensor, Tensor | None]:
            if input_ids.shape[1] > cache.length + 1:
                self.streams.encode(input_ids[:, cache.length : -1], cache)
            return self.streams.step(input_ids[:, -1:], cache, self.name)

        return step

    def _comparison(self, mask: Tensor, answers: Answers) -> _Comparison | None:
        return _Comparison(answers)


def _scored(logits: Tensor, targets: Tensor) -> list[Scored]:
    """Of logits (B, R, V) and the tokens (B, R) that they should predict; -100 is none."""
    wanted = targets != IGNORED
    log_probabilities = -F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(targets)
    greedy = ((logits.argmax(-1) == targets) | ~wanted).all(1)
    return [Scored(log_probabilities[i, wanted[i]].tolist(), bool(greedy[i])) for i in range(len(targets))]


def _without_labels(prompts: Sequence[Sequence[int]]) -> list[TokenRow]:
    return [TokenRow(prompt, [IGNORED] * len(prompt)) for prompt in prompts]


def _start(row: TokenRow) -> int:
    """Where the first token stands that is to be predicted."""
    return next(index for index, label in enumerate(row.labels) if label != IGNORED)


def _prompt(row: TokenRow) -> list[int]:
    return list(row.input_ids[: _start(row)])


def _mask(batch: Batch) -> Tensor:
    """(B, T): 1 where there is a token, 0 where there is padding."""
    return (batch.document_ids >= 0).long()


def _padding(mask: Tensor) -> Tensor:
    return (mask == 0).sum(1)


class Sides:
    """A base model and the adapters that are compared on it.

    Every adapter is loaded once at the start, so that one that cannot be used is refused before anything runs.

    Args:
        model: a Transformers causal LM without adapters.
        tokenizer: its tokenizer.
        sources: name -> folder or Hub id of an adapter of either kind.

    Raises:
        AdapterError: an adapter is damaged, or an ICaRus adapter of another base model.
        InputError: an adapter has the base model's name.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        sources: Mapping[str, str | Path] | None = None,
    ) -> None:
        self.model, self.codec = model.eval(), Codec(tokenizer)
        self._folders = {name: adapters.locate(source) for name, source in (sources or {}).items()}
        if BASE in self._folders:
            raise InputError(f"An adapter cannot be named {BASE!r}: that is the base model; choose another name.")
        kinds: dict[str, Kind] = {  # what is neither is told so by the checks of ICaRus adapters
            name: "conventional" if adapters.is_conventional(folder) else "icarus"
            for name, folder in self._folders.items()
        }
        self.kinds: dict[str, Kind] = {BASE: "base", **kinds}
        """Who there is, the base model first, and of which kind."""
        self._fingerprint = adapters.fingerprint(model) if "icarus" in kinds.values() else None
        for name in kinds:
            with self.side(name):
                pass

    @classmethod
    def load(
        cls,
        base: str = packaged_model.PACKAGED,
        sources: Mapping[str, str | Path] | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
    ) -> Sides:
        """Load a base model (Hub id, folder, or the packaged one), and see to the adapters."""
        return cls(*base_model.load(base, dtype=dtype, device=device), sources)

    @property
    def identities(self) -> dict[str, str]:
        """A hash of each side's weights and settings."""
        return {BASE: self._fingerprint or adapters.fingerprint(self.model)} | {
            name: _digest(folder) for name, folder in self._folders.items()
        }

    @contextmanager
    def side(self, name: str) -> Iterator[Side]:
        """One side, whose adapter is attached inside the block.

        Raises:
            InputError: nobody has that name.
        """
        if name not in self.kinds:
            raise InputError(f"No side is named {name!r}; there are {', '.join(self.kinds)}.")
        if name == BASE:
            yield Plain(self.model, self.codec, "base")
            return
        icarus = self.kinds[name] == "icarus"
        adapted: Any = adapters.load(
            self.model, self._folders[name], name, verify=icarus, base_fingerprint=self._fingerprint
        ).eval()
        try:
            yield TwoStream(adapted, self.codec, name) if icarus else Plain(adapted, self.codec, "conventional")
        finally:
            adapted.unload()


def _digest(folder: Path) -> str:
    whole = hashlib.sha256()
    for file in (adapters.CONFIG_NAME, adapters.WEIGHTS_NAME):
        whole.update((folder / file).read_bytes())
    return whole.hexdigest()
