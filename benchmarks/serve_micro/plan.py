"""What the engines are asked for, in which order, and the work that is in each measurement.

A side is an engine and whom its requests are for: its adapters, or the base model. Sides of one measurement take
turns; every other round goes backwards, so that none always runs behind the same neighbour.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.serve_micro.bounds import Work
from icarus.bench.checkpoints import adapter_name

SYSTEMS = ("base", "stock", "conventional", "icarus")
BATCHES = (1, 8, 16)
ADAPTERS, RANK = 8, 16
SEED = 0
DECODED_PROMPT = 128
CHAIN_TOKENS = 16
PREFILLED = 3
"""Prompts that a side is asked in a row, of which the median counts; the first is a few per cent slower."""
BLOCK = 32
"""Tokens of a KV cache block: what a prefix is shared in."""

Message = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is measured: tokens of the long prompt, decode steps, starts of engines, rounds in each, token ids."""

    prompt: int
    steps: int
    starts: int
    repeats: int
    vocabulary: int
    seed: int

    @property
    def decoded_prompt(self) -> int:
        """Tokens of each prompt whose decoding is measured."""
        return min(DECODED_PROMPT, self.prompt)


@dataclass(frozen=True)
class Side:
    """An engine, and whether its requests name adapters or the base model."""

    system: str
    adapted: bool

    @property
    def name(self) -> str:
        """As reports call it."""
        return self.system if self.adapted or self.system == "base" else f"base model on {self.system}"


@dataclass(frozen=True)
class Measurement:
    """One table of the report. ``batch`` is 0 where requests come one after another."""

    name: str
    unit: str
    sides: tuple[Side, ...]
    batch: int = 0
    tokens: int = 1
    turns: int = 1
    warm_up: bool = True
    once: frozenset[str] = frozenset()  # systems that take part in one round only

    def rounds(self, repeats: int) -> Iterator[tuple[int, tuple[Side, ...]]]:
        """Rounds by number with their sides in order; round -1, where there is one, is not counted."""
        for number in range(-1 if self.warm_up else 0, repeats):
            sides = self.sides if number % 2 == 0 else self.sides[::-1]
            yield number, tuple(side for side in sides if number <= 0 or side.system not in self.once)

    def command(self, side: Side, round_: int, sizes: Sizes) -> Message:
        """For ``engine.py``. Prompts are new in every round, and the same on all engines of a round."""
        source = random.Random(f"{sizes.seed} {self.name} {round_} {side.adapted}")

        def prompt(length: int) -> list[int]:
            return [source.randrange(sizes.vocabulary) for _ in range(length)]

        def adapter(number: int) -> str | None:
            return adapter_name(number % ADAPTERS) if side.adapted else None

        if self.batch:
            requests = [
                {"prompt": prompt(sizes.decoded_prompt), "adapter": adapter(max(round_, 0) + i)}
                for i in range(self.batch)
            ]
            return {"do": "decode", "requests": requests, "steps": sizes.steps}
        if self.turns > 1:
            one = prompt(sizes.prompt)
            requests = [{"prompt": one, "adapter": adapter(i)} for i in range(self.turns)]
        else:
            first = max(round_, 0)
            requests = [{"prompt": prompt(sizes.prompt), "adapter": adapter(first + i)} for i in range(PREFILLED)]
        return {"do": "turns", "requests": requests, "tokens": self.tokens}

    def seconds(self, answer: Message) -> float:
        """What one answer took: the median decode step, the median prefill, or all turns together."""
        if self.batch:
            return float(statistics.median(answer["step_seconds"]))
        taken = [float(turn["seconds"]) for turn in answer["turns"]]
        return sum(taken) if self.turns > 1 else statistics.median(taken)

    def figure(self, seconds: float, sizes: Sizes) -> float:
        """Seconds in the measurement's unit."""
        if self.unit == "s":
            return seconds
        return (self.batch or sizes.prompt) / seconds

    def works(self, side: Side, sizes: Sizes, adapter_weights: int) -> list[Work]:
        """The work that the method itself needs, for ``bounds``."""
        streams = 2 if side.adapted and side.system == "icarus" else 1
        if self.batch:
            context = self.batch * (sizes.decoded_prompt + sizes.steps // 2)
            different = min(self.batch, ADAPTERS) if side.adapted else 0
            return [_decode(self.batch, context, streams, different, adapter_weights)]
        adapters = int(side.adapted)
        whole = _prefill(sizes.prompt, sizes.prompt, streams, adapters, adapter_weights)
        if self.turns == 1:
            return [whole]
        step = _decode(1, sizes.prompt + self.tokens // 2, streams, 1, adapter_weights)
        works = [replace(step, times=self.turns * (self.tokens - 1))]
        if streams == 1:
            return [*works, replace(whole, times=self.turns)]
        rest = _prefill(rest_of(sizes.prompt), sizes.prompt, streams, adapters, adapter_weights)
        return [*works, whole, replace(rest, times=self.turns - 1)]


def rest_of(prompt: int) -> int:
    """Tokens of a prompt that are computed when all of its whole blocks are cached: at least one has to be."""
    return (prompt - 1) % BLOCK + 1


def _prefill(rows: int, context: int, streams: int, adapters: int, adapter_weights: int) -> Work:
    """With two streams the adapter is applied to the one decoder row, else to all rows."""
    before = context - rows
    return Work(
        rows=rows + streams - 1,
        sampled=1,
        context=context,
        pairs=rows * before + rows * (rows + 1) // 2 + (streams - 1) * context,
        adapted=adapters * (1 if streams == 2 else rows),
        adapters=adapters,
        adapter_weights=adapter_weights,
    )


def _decode(batch: int, context: int, streams: int, adapters: int, adapter_weights: int) -> Work:
    return Work(
        rows=streams * batch,
        sampled=batch,
        context=context,
        pairs=streams * context,
        adapted=batch if adapters else 0,
        adapters=adapters,
        adapter_weights=adapter_weights,
    )


def measurements(systems: Sequence[str]) -> list[Measurement]:
    """All of them, for the engines that are there."""
    own = tuple(Side(system, adapted=system != "base") for system in systems)
    lent = tuple(Side(system, adapted=False) for system in systems if system != "base")
    serving = tuple(side for side in own if side.adapted)
    # The largest batch of the base model is asked of its own engine alone: what adapters cost it shows in the others.
    decode = [
        Measurement(f"decode, batch {batch}", "tokens/s", own + (lent if batch < max(BATCHES) else ()), batch=batch)
        for batch in BATCHES
    ]
    prefill = Measurement("prefill", "tokens/s", own + lent)
    chain = Measurement(
        "chain", "s", serving, tokens=CHAIN_TOKENS, turns=ADAPTERS, warm_up=False, once=frozenset({"stock"})
    )
    return [*decode, prefill, *([chain] if serving else [])]
