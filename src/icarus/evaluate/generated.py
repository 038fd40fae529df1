"""What a batch generates, read token by token: its text, where it ends, how far it is from the base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import StoppingCriteria

from icarus.chat_template import Codec, Reader
from icarus.context import TurnText


@dataclass(frozen=True)
class Answer:
    """What a side generated; ``text`` ends before a stop string, ``token_ids`` hold it."""

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    drift: float = 0.0
    """KL divergence from the base model, in nats per generated token: of this side's distributions from its."""


class Answers(StoppingCriteria):
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
        self._drifts: list[list[float]] = []  # of each token that was generated, by row

    def compare(self, logits: Tensor, base: Tensor) -> None:
        """What predicts the next n tokens (B, n, V), beside the base model's predictions."""
        self._drifts.extend(_divergence(logits, base).T.tolist())

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if not self._done(row):
                self._tokens[row].append(token)
                self._texts[row].push(token)
                self._stopped[row] = token in self._ends or self._texts[row].end is not None
        done = [self._done(row) for row in range(len(self._tokens))]
        return torch.tensor(done, device=input_ids.device)

    def finished(self) -> list[Answer]:
        """All answers."""
        return [
            Answer(text.whole[: text.end], tokens, "stop" if stopped else "length", self._drift(row))
            for row, (text, tokens, stopped) in enumerate(zip(self._texts, self._tokens, self._stopped, strict=True))
        ]

    def _drift(self, row: int) -> float:
        """The mean over a row's tokens; what came behind its end is in none."""
        own = [drifts[row] for drifts in self._drifts[: len(self._tokens[row])]]
        return sum(own) / max(len(own), 1)

    def _done(self, row: int) -> bool:
        return self._stopped[row] or len(self._tokens[row]) >= self._limits[row]


def _divergence(logits: Tensor, base: Tensor) -> Tensor:
    """KL(p || q) of the distributions of two (..., V), in nats."""
    own, its = (part.float().log_softmax(-1) for part in (logits, base))
    return F.kl_div(its, own, log_target=True, reduction="none").sum(-1)
