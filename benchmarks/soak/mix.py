"""The random mix: what is asked of an engine and done to it, as a list of operations. The same for the same seed.

Operations are JSON, so that they travel to the engine's process and stay with a failure that they found:

    {"ask": {...}}           a request enters (``Request``)
    {"step": N}              the engine takes up to N steps
    {"cancel": NUMBER}       a request is aborted
    {"swap": [NAME, V]}      an ICaRus adapter is replaced by its version V, whoever uses it
    {"quiet": NAME}          steps until no request of an adapter is left
    {"renew": [NAME, V]}     an adapter is unloaded, and its version V loaded under a new id; a conventional one under a
                             new name as well, since its own is in the cache's keys
    {"reload": NAME}         an ICaRus adapter is loaded again in place, as it is
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

BASE = "base"
UNSCORED = {"wide"}
"""Adapters of the head, which vLLM leaves out of ``prompt_logprobs`` (vLLM issue 51594)."""

Operation = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request: greedy, to its last token."""

    number: int
    model: str
    prompt: list[int]
    """Token ids; behind those of ``follows``, where that is set."""
    max_tokens: int
    follows: int | None = None
    """The request whose prompt and answer, as far as it got, this one goes on from."""
    streamed: bool = False
    scored: bool = False
    """Asks for the log-probabilities of its prompt."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Of requests, on average."""

    base: float = 0.28
    conventional: float = 0.30
    shared: float = 0.38
    """Begin as others do."""
    following: float = 0.27
    """Go on where another one stopped, as the next agent does."""
    streamed: float = 0.45
    scored: float = 0.28
    cancelled: float = 0.09
    swapped: float = 0.14
    """A swap comes behind so many requests."""
    renewed: float = 0.02
    reloaded: float = 0.02


class Mix:
    """Draws operations for adapters of these names; ``draw`` gives so many tokens, others each time."""

    def __init__(
        self,
        seed: str,
        specialists: list[str],
        conventional: list[str],
        *,
        draw: Callable[[random.Random, int], list[int]],
        longest: int = 150,
        versions: int = 3,
        shares: Shares | None = None,
    ) -> None:
        self._rng, self._shares = random.Random(seed), shares or Shares()
        self._specialists, self._conventional = specialists, conventional
        self._draw, self._longest, self._versions = draw, longest, versions
        self._trunks = [self._tokens(longest) for _ in range(5)]
        self._current = dict.fromkeys([*specialists, *conventional], 0)
        self._told: list[Request] = []

    def operations(self, requests: int) -> list[Operation]:
        """So many requests and what goes on beside them; the engine is drained behind the last."""
        listed: list[Operation] = []
        due: list[tuple[int, int]] = []  # when to cancel whom, by the number of requests that have come
        for number in range(requests):
            request = self._request(number)
            listed.append({"ask": asdict(request)})
            self._told.append(request)
            if self._chance(self._shares.cancelled):
                due.append((number + self._rng.choice((0, 0, 1, 2)), number))
            listed += self._steps()
            listed += [{"cancel": who} for when, who in due if when <= number]
            due = [item for item in due if item[0] > number]
            listed += self._changes()
        return listed

    def _request(self, number: int) -> Request:
        model = self._model()
        scored = self._chance(self._shares.scored) and model not in UNSCORED
        request = Request(
            number=number,
            model=model,
            prompt=[],
            max_tokens=self._rng.choice((1, 2, 4, 8, 12, 16, 24, 40)),
            streamed=self._chance(self._shares.streamed),
            scored=scored,
        )
        kind = self._rng.random()
        if self._told and kind < self._shares.following:
            before = self._rng.choice(self._told[-12:])
            room = self._longest - self._length(before)
            if room > 0:
                return replace(request, follows=before.number, prompt=self._tokens(self._rng.randint(1, min(room, 30))))
        if kind < self._shares.following + self._shares.shared:
            trunk = self._rng.choice(self._trunks)[: self._rng.randint(1, self._longest - 20)]
            return replace(request, prompt=trunk + self._tokens(self._rng.randint(1, 20)))
        return replace(request, prompt=self._tokens(self._rng.randint(1, self._longest)))

    def _length(self, request: Request) -> int:
        """At most, with its answer."""
        own = len(request.prompt) + request.max_tokens
        return own if request.follows is None else own + self._length(self._told[request.follows])

    def _model(self) -> str:
        kind = self._rng.random()
        if kind < self._shares.base:
            return BASE
        conventional = kind < self._shares.base + self._shares.conventional
        return self._rng.choice(self._conventional if conventional else self._specialists)

    def _steps(self) -> Iterator[Operation]:
        """Often none, so that many requests are in the engine together; sometimes all, so that it is empty."""
        kind = self._rng.random()
        if kind < 0.55:
            yield {"step": self._rng.randint(1, 6)}
        elif kind < 0.62:
            yield {"step": 40}

    def _changes(self) -> Iterator[Operation]:
        if self._chance(self._shares.swapped):
            name = self._rng.choice(self._specialists)
            if self._chance(0.3):
                yield {"quiet": name}
            yield {"swap": [name, self._next(name)]}
        if self._chance(self._shares.reloaded):
            yield {"reload": self._rng.choice(self._specialists)}
        if self._chance(self._shares.renewed):
            name = self._rng.choice([*self._specialists, *self._conventional])
            yield {"quiet": name}
            yield {"renew": [name, self._next(name)]}

    def _next(self, name: str) -> int:
        """Another version than the last."""
        others = [version for version in range(self._versions) if version != self._current[name]]
        self._current[name] = self._rng.choice(others)
        return self._current[name]

    def _tokens(self, count: int) -> list[int]:
        return self._draw(self._rng, count)

    def _chance(self, share: float) -> bool:
        return self._rng.random() < share


def engine_options(seed: str, *, compiled: bool = False) -> dict[str, Any]:
    """Options of an engine that has too little of everything."""
    rng = random.Random(f"options {seed}")
    slots = rng.choice((1, 2, 3))
    options: dict[str, Any] = {
        "max_num_seqs": rng.choice((4, 8, 12)),
        "max_num_batched_tokens": rng.choice((16, 24, 48, 96)),
        "num_gpu_blocks_override": rng.choice((9, 10, 12, 24, 64, 128)),
        "max_loras": slots,
        "max_cpu_loras": rng.randint(slots, 4),
        "enable_prefix_caching": rng.random() < 0.85,
        "async_scheduling": rng.random() < 0.5,
        "enforce_eager": not compiled,
    }
    if rng.random() < 0.12:
        options["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 3,
        }
        options |= {"async_scheduling": False, "max_num_batched_tokens": 96}  # vLLM drafts with n-grams like this only
    return options
