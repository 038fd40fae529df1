"""What is right, in process and in float32: greedy tokens and log-probabilities of contexts, and of PEFT's own pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.soak.judge import agreement
from benchmarks.soak.mix import BASE
from benchmarks.soak.shop import Shop
from icarus import base_model
from icarus.context import Specialists
from icarus.streams import EncoderCache

Speaker = tuple[str, int]
"""A model and the version of its adapter."""


class Reference:
    """Base model and specialists in contexts; conventional adapters as PEFT runs them, each with all of its context."""

    def __init__(self, shop: Shop) -> None:
        from peft import PeftModel

        self._shop = shop
        self._team = Specialists(*_loaded(shop))
        for name, folders in shop.specialists.items():
            for version, folder in enumerate(folders):
                self._team.add(_attached(name, version), folder)
        self._peft: Any = None
        for name, folders in shop.conventional.items():
            for version, folder in enumerate(folders):
                attached = _attached(name, version)
                if self._peft is None:
                    self._peft = PeftModel.from_pretrained(_loaded(shop)[0], str(folder), attached).eval()
                else:
                    self._peft.load_adapter(str(folder), attached)
        self._known: dict[tuple[Speaker, tuple[int, ...]], list[int]] = {}

    def tokens(self, speaker: Speaker, prompt: list[int], likely: list[int]) -> list[int]:
        """As many greedy tokens as ``likely`` has, sooner where these are the ones."""
        key, count = (speaker, tuple(prompt)), len(likely)
        known = self._known.setdefault(key, [])
        if len(known) < count:
            agreed = likely[len(known) :] if known == likely[: len(known)] else []
            known += self._more(speaker, [*prompt, *known], count - len(known), agreed)
        return known[:count]

    def scores(self, speaker: Speaker, prompt: list[int]) -> list[float]:
        """Log-probability of each token but the first."""
        logits = self._logits(speaker, prompt)[:-1].log_softmax(-1)
        chosen: list[float] = logits.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
        return chosen

    def gap(self, speaker: Speaker, prompt: list[int], token: int) -> float:
        """By how much the best logit behind a prompt is above that of a token."""
        logits = self._logits(speaker, prompt)[-1]
        return float(logits.max() - logits[token])

    def _more(self, speaker: Speaker, prompt: list[int], count: int, likely: list[int]) -> list[int]:
        name, version = speaker
        if name not in self._shop.conventional:
            turn = self._team.context().append(prompt).generate(_attached(name, version), max_new_tokens=count)
            return turn.token_ids
        added: list[int] = []
        while len(added) < count:  # what is likely is checked in one pass, and goes on behind the first that is wrong
            guess = likely[len(added) : count - 1] if added == likely[: len(added)] else []
            greedy = self._logits(speaker, [*prompt, *added, *guess])[-len(guess) - 1 :].argmax(-1).tolist()
            added += greedy[: agreement(guess, greedy) + 1]
        return added

    @torch.no_grad()
    def _logits(self, speaker: Speaker, prompt: list[int]) -> Tensor:
        """Of every position, (T, V)."""
        name, version = speaker
        ids = torch.tensor([prompt])
        if name in self._shop.conventional:
            self._peft.set_adapter(_attached(name, version))
            logits: Tensor = self._peft(input_ids=ids, use_cache=False).logits[0]
            return logits
        streams, cache = self._team.streams, EncoderCache()
        encoded = streams.encode(ids, cache, logits_to_keep=len(prompt))
        return (encoded if name == BASE else streams.decode(ids, cache, _attached(name, version)))[0]


def _attached(name: str, version: int) -> str:
    return name if name == BASE else f"{name}-{version}"


def _loaded(shop: Shop) -> tuple[Any, Any]:
    model, tokenizer = base_model.load(str(shop.base), dtype="float32")
    model.generation_config.eos_token_id = None  # engines are told to ignore it, too
    return model, tokenizer
