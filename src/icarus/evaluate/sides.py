"""Who answers: the base model, conventional adapters as PEFT runs them, ICaRus adapters in two streams.

All share one base model in memory: an adapter is attached while its side answers, and taken off again. The marker in an
adapter's config says of which kind it is, so none is run as the other.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from icarus import adapter as adapters
from icarus import base_model, packaged_model
from icarus.chat_template import Codec, Reader
from icarus.context import BASE, TurnText
from icarus.errors import InputError
from icarus.streams import IGNORED, Batch, EncoderCache, TwoStreams

Kind = Literal["base", "conventional", "icarus"]
Watch = Callable[[Tensor, Tensor], None]


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


@dataclass(frozen=True)
class Answer:
    """What a side generated; ``text`` ends before a stop string, ``token_ids`` hold it."""

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    drift: float = 0.0
    """KL divergence from the base model, in nats per generated token: of this side's distributions from its."""


class Side(ABC):
    """One side of a comparison, over batches. Greedy; rows of a batch are padded on the left."""

    kind: Kind

    def __init__(self, model: nn.Module, codec: Codec) -> None:
        self.model: Any = model
        self.codec = codec
        self.causal_lm: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]

    @property
    def max_length(self) -> int | None:
        """The positions that the model has."""
        limit: int | None = getattr(self.causal_lm.config.get_text_config(), "max_position_embeddings", None)
        return limit

    @torch.no_grad()
    def score(self, rows: Sequence[TokenRow]) -> list[Scored]:
        """Log-probability of each token that is to be predicted."""
        logits, targets = self._predictions(self._batch(rows))
        wanted = targets != IGNORED
        log_probabilities = -F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(targets)
        greedy = ((logits.argmax(-1) == targets) | ~wanted).all(1)
        return [Scored(log_probabilities[i, wanted[i]].tolist(), bool(greedy[i])) for i in range(len(rows))]

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[Answer]:
        """The answers behind prompts of one or more tokens each, as a ``Context`` or PEFT's ``generate`` gives them.

        An answer ends with the model's or the tokenizer's end token, before a text of ``stop``, after
        ``max_new_tokens``, or at the model's last position.
        """
        limits = [
            max_new_tokens if not self.max_length else min(max_new_tokens, self.max_length - len(p)) for p in prompts
        ]
        batch = self._batch([TokenRow(prompt, [IGNORED] * len(prompt)) for prompt in prompts])
        answers = _Answers(self.codec, prompts, limits, self._ends(), stop)
        mask = (batch.document_ids >= 0).long()
        self.causal_lm.generate(
            batch.input_ids,
            attention_mask=mask,
            generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
                do_sample=False, max_new_tokens=max(limits), pad_token_id=self._padding
            ),
            stopping_criteria=StoppingCriteriaList([answers]),
            **self.generation(mask, answers.compare),
        )
        return self._with_drift(prompts, answers.finished())

    @abstractmethod
    def _predictions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (B, R, V) for the targets (B, R) of a batch; -100 pads."""

    def generation(self, mask: Tensor, watch: Watch | None = None) -> dict[str, Any]:
        """What Transformers' ``generate`` needs to run this side; the mask (B, T) tells tokens from padding.

        ``watch`` gets this side's and the base model's logits (B, V) at each token, if that costs nothing.
        """
        return {}

    def _with_drift(self, prompts: Sequence[Sequence[int]], answers: list[Answer]) -> list[Answer]:
        """The answers, as far as their drift is not known from the generation itself."""
        return answers

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
            attention_mask=(batch.document_ids >= 0).long(),
            position_ids=batch.position_ids,
            logits_to_keep=torch.arange(
                first, batch.input_ids.shape[1], device=self.causal_lm.device
            ),  # no gaps: see streams
            use_cache=False,
        ).logits
        places = (rows - first).clamp(min=0)  # those of the padding are anywhere
        return logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1])), targets

    def _with_drift(self, prompts: Sequence[Sequence[int]], answers: list[Answer]) -> list[Answer]:
        """Two passes over what was generated, with the adapter and without it; row by row, as logits are large."""
        if self.kind == "base":
            return answers
        drifted = []
        for prompt, answer in zip(prompts, answers, strict=True):
            batch = self._batch([TokenRow([*prompt, *answer.token_ids], [IGNORED] * len(prompt) + answer.token_ids)])
            own, _ = self._predictions(batch)
            with self.model.disable_adapter():
                base, _ = self._predictions(batch)
            drifted.append(replace(answer, drift=float(_divergence(own, base).mean())))
        return drifted


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

    def generation(self, mask: Tensor, watch: Watch | None = None) -> dict[str, Any]:
        def loop(model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, **_: Any) -> Tensor:
            cache = EncoderCache(padding=(mask == 0).sum(1))
            if input_ids.shape[1] > 1:
                self.streams.encode(input_ids[:, :-1], cache)
            done = False
            while not done:
                logits, base = self.streams.step(input_ids[:, -1:], cache, self.name)
                if watch:
                    watch(logits, base)
                token = logits_processor(input_ids, logits.float()).argmax(-1)
                input_ids = torch.cat([input_ids, token[:, None]], dim=1)
                done = bool(stopping_criteria(input_ids, None).all())
            return input_ids

        return {"custom_generate": loop}


class _Answers(StoppingCriteria):
    """Reads what a batch generates, token by token, and tells which rows have come to their end."""

    def __init__(
        self,
        codec: Codec,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        ends: frozenset[int],
        stop: Sequence[str],
    ) -> None:
        self._texts = [TurnText(Reader(codec, prompt), None, stop) for prompt in prompts]
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self._limits, self._ends = limits, ends
        self._stopped = [False] * len(prompts)
        self._drifts = [0.0] * len(prompts)

    def compare(self, logits: Tensor, base: Tensor) -> None:
        """What predicts the next tokens (B, V), beside the base model's prediction."""
        for row, drift in enumerate(_divergence(logits, base).tolist()):
            if not self._done(row):
                self._drifts[row] += drift

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if not self._done(row):
                self._tokens[row].append(token)
                self._texts[row].push(token)
                self._stopped[row] = token in self._ends or self._texts[row].end is not None
        done = [self._done(row) for row in range(len(self._tokens))]
        return torch.tensor(done, device=input_ids.device)

    def finished(self) -> list[Answer]:
        return [
            Answer(text.whole[: text.end], tokens, "stop" if stopped else "length", drift / max(len(tokens), 1))
            for text, tokens, stopped, drift in zip(self._texts, self._tokens, self._stopped, self._drifts, strict=True)
        ]

    def _done(self, row: int) -> bool:
        return self._stopped[row] or len(self._tokens[row]) >= self._limits[row]


def _divergence(logits: Tensor, base: Tensor) -> Tensor:
    """KL(p || q) of the distributions of two (..., V), in nats."""
    own, its = (part.float().log_softmax(-1) for part in (logits, base))
    return F.kl_div(its, own, log_target=True, reduction="none").sum(-1)


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
