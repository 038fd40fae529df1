"""LoRA of many adapters on a CPU: products over groups of rows, in place of a copy of the weights for each row.

vLLM's CPU operators (vllm/lora/ops/torch_ops/lora_ops.py) copy A and B of its adapter for every row of a step, rows
without an adapter included. Here the rows of a step are parted once (``parts``), and layers multiply part by part:

    many rows of one adapter    y[part] += (x[part] @ A.T) @ B.T, in the precision of the model
    few rows of few adapters    the same in float32: a product of small matrices takes longer to start in bf16 (oneDNN)
                                than to compute in float32 (MKL)
    few rows of many adapters   two batched products in float32, a batch for each slot, its rows padded to the longest
    no adapter                  in no part: costs nothing

Tensors only, no vLLM: cpu_lora.py connects them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor

from icarus.errors import InputError

SWITCH = "ICARUS_CPU_LORA"

LONG = 32
"""Rows of one adapter from which on a run is computed alone."""

FEW = 3
"""Runs up to this many are computed one by one and not in a batch."""


def wanted() -> bool:
    """Whether the environment asks for these operators; they are on unless switched off. Raises InputError."""
    value = os.environ.get(SWITCH, "1")
    if value not in ("0", "1"):
        raise InputError(f"{SWITCH}={value!r} is neither 1 (ICaRus's LoRA operators on CPUs) nor 0 (vLLM's own).")
    return value == "1"


@dataclass(frozen=True)
class Part:
    """Rows of a step that are computed together, and their adapters."""

    rows: slice | Tensor  # in the step
    slots: range  # of their adapters, or a range that holds them
    used: frozenset[int]
    order: Tensor | None = None  # (slots, longest): which of ``rows`` each slot has, padded with any; None for one slot
    places: Tensor | None = None  # where each of ``rows`` stands in ``order``, flattened

    many: bool = False  # a long run of one adapter

    def of(self, slot: int) -> slice | Tensor:
        """The rows in the step that have the adapter in a slot which is used."""
        if self.order is None or self.places is None:
            return self.rows
        rows = torch.arange(self.rows.start, self.rows.stop) if isinstance(self.rows, slice) else self.rows
        return rows[self.places // self.order.shape[1] == slot - self.slots.start]


@dataclass(frozen=True)
class _Run:
    start: int
    end: int
    slot: int


def parts(slots: Sequence[int]) -> list[Part]:
    """The parts of a step whose rows have adapters in these slots, -1 for none."""
    found: list[Part] = []
    for cluster in _clusters(slots):
        if len(cluster) <= FEW:
            found += [_alone(run) for run in cluster]
        else:
            found.append(_batch(cluster))
    return found


def _alone(run: _Run) -> Part:
    slots, many = range(run.slot, run.slot + 1), run.end - run.start >= LONG
    return Part(slice(run.start, run.end), slots, frozenset({run.slot}), many=many)


def _batch(cluster: Sequence[_Run]) -> Part:
    rows = [row for run in cluster for row in range(run.start, run.end)]
    own = [run.slot for run in cluster for _ in range(run.start, run.end)]
    slots = range(min(own), max(own) + 1)
    held: list[list[int]] = [[] for _ in slots]
    for place, slot in enumerate(own):
        held[slot - slots.start].append(place)
    longest = max(map(len, held))
    order = torch.tensor([places + [0] * (longest - len(places)) for places in held])
    places = [0] * len(own)
    for index, mine in enumerate(held):
        for offset, place in enumerate(mine):
            places[place] = index * longest + offset
    together = rows[-1] - rows[0] + 1 == len(rows)
    where = slice(rows[0], rows[-1] + 1) if together else torch.tensor(rows)
    return Part(where, slots, frozenset(own), order, torch.tensor(places))


def _clusters(slots: Sequence[int]) -> Iterator[list[_Run]]:
    """Runs with an adapter that are computed together: long ones alone, short ones with their neighbours."""
    cluster: list[_Run] = []
    for run in _runs(slots):
        alone = run.end - run.start >= LONG
        if cluster and (alone or run.start - cluster[-1].end >= LONG):
            yield cluster
            cluster = []
        if alone:
            yield [run]
        else:
            cluster.append(run)
    if cluster:
        yield cluster


def _runs(slots: Sequence[int]) -> Iterator[_Run]:
    start = 0
    for row in range(1, len(slots) + 1):
        if row == len(slots) or slots[row] != slots[start]:
            if slots[start] >= 0:
                yield _Run(start, row, slots[start])
            start = row


_Single = tuple[Tensor, list[tuple[slice, slice, Tensor]]]
"""A.T of one adapter's slices side by side, and per slice: its columns of the output, its columns of A.T, and B.T."""


class Layer:
    """The adapters of one linear layer, whose output has one slice or several (q, k and v are one layer)."""

    def __init__(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
        """
        Args:
            a: per slice (M, 1, r, inputs), vLLM's memory, which it fills when it loads an adapter (``lora_a_stacked``).
            b: per slice (M, 1, outputs, r).
        """
        self._a, self._b = [part[:, 0] for part in a], [part[:, 0] for part in b]
        ends = list(accumulate(part.shape[1] for part in self._b))
        self._columns = [slice(end - part.shape[1], end) for end, part in zip(ends, self._b, strict=True)]
        self._filled: list[set[int]] = [set() for _ in b]
        # Copies in float32 of slices that an adapter has: (M, slices r, inputs), and per slice (M, r, outputs).
        self._inner: Tensor | None = None
        self._outer: list[Tensor | None] = [None for _ in b]
        self._single: dict[int, _Single] = {}
        for slot in range(len(self._a[0])):
            self.refresh(slot)

    def refresh(self, slot: int) -> None:
        """Look at the weights in a slot again; to be called after an adapter was put there."""
        for i, part in enumerate(self._b):
            holds = bool(part[slot].any())
            (self._filled[i].add if holds else self._filled[i].discard)(slot)
            if not holds and self._outer[i] is None:
                continue
            with torch.inference_mode(False):  # vLLM also loads adapters outside of it, and then could not write here
                inner, outer = self._copies(i)
                inner[slot] = torch.cat([a[slot] for a in self._a])
                outer[slot] = part[slot].t()
        self._single.pop(slot, None)

    def _copies(self, i: int) -> tuple[Tensor, Tensor]:
        slots, rank, inputs = self._a[0].shape
        if self._inner is None:
            self._inner = torch.zeros(slots, len(self._a) * rank, inputs)
        if (outer := self._outer[i]) is None:
            self._outer[i] = outer = torch.zeros(slots, rank, self._b[i].shape[1])
        return self._inner, outer

    def add(self, y: Tensor, x: Tensor, found: Sequence[Part]) -> None:
        """Add to the outputs ``y`` (rows, outputs of all slices) what adapters make of ``x`` (rows, inputs)."""
        for part in found:
            filled = [i for i, slots in enumerate(self._filled) if slots & part.used]
            if not filled:
                continue
            if part.order is not None:
                self._add_batch(y, x[part.rows].float(), part, filled)
            elif part.many:
                self._add_many(y[part.rows], x[part.rows], part.slots.start, filled)
            else:
                self._add_few(y[part.rows], x[part.rows].float(), part.slots.start, filled)

    def _add_many(self, y: Tensor, x: Tensor, slot: int, filled: Sequence[int]) -> None:
        for i in filled:
            y[:, self._columns[i]] += (x.to(self._a[i].dtype) @ self._a[i][slot].t()) @ self._b[i][slot].t()

    def _add_few(self, y: Tensor, x: Tensor, slot: int, filled: Sequence[int]) -> None:
        """One product with A of all slices, one with B of each."""
        if slot not in self._single:
            self._single[slot] = self._views(slot, filled)
        a, slices = self._single[slot]
        shrunk = x @ a
        for columns, own, b in slices:
            y[:, columns] += shrunk[:, own] @ b

    def _views(self, slot: int, filled: Sequence[int]) -> _Single:
        """What ``_add_few`` multiplies with, kept because finding it takes as long as multiplying."""
        rank, inner, outer = self._a[0].shape[1], cast(Tensor, self._inner), cast(list[Tensor], self._outer)
        own = [slice((i - filled[0]) * rank, (i - filled[0] + 1) * rank) for i in filled]
        a = inner[slot, filled[0] * rank : (filled[-1] + 1) * rank].t()
        return a, [(self._columns[i], part, outer[i][slot]) for i, part in zip(filled, own, strict=True)]

    def _add_batch(self, y: Tensor, x: Tensor, part: Part, filled: Sequence[int]) -> None:
        """The same for a range of slots at once."""
        inner, outer = cast(Tensor, self._inner), cast(list[Tensor], self._outer)
        rank, slots = self._a[0].shape[1], slice(part.slots.start, part.slots.stop)
        a = inner[slots, filled[0] * rank : (filled[-1] + 1) * rank]
        shrunk = x[part.order] @ a.transpose(1, 2)  # (slots, longest, slices r)
        for i in filled:
            own = shrunk[..., (i - filled[0]) * rank : (i - filled[0] + 1) * rank]
            y[part.rows, self._columns[i]] += (own @ outer[i][slots]).flatten(0, 1)[part.places]
