"""LoRA of many adapters on a CPU: two products for each run of rows, in place of a copy of the weights for each row.

vLLM's CPU operators (vllm/lora/ops/torch_ops/lora_ops.py) copy A and B of its adapter for every row of a step, rows
without an adapter included. Here the rows of a step are parted once (``parts``), and layers multiply part by part:

    one adapter    y[part] += (x[part] @ A.T) @ B.T
    several        the same product with all resident adapters side by side, (rows, M r), in which a mask keeps for each
                   row the r columns of its own adapter: two products however many adapters there are
    no adapter     in no part: costs nothing

A product of bf16 matrices costs some 20 microseconds before it computes anything, one in float32 about 4 (oneDNN
against MKL), so parts of few rows are computed in float32. Tensors only, no vLLM: cpu_lora.py connects them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icarus.errors import InputError

SWITCH = "ICARUS_CPU_LORA"

LONG = 32
"""Rows of one adapter from which on a run is worth a product of its own."""

FEW = 3
"""Runs up to this many are cheaper one by one than masked (measured with SmolLM2-135M)."""


def wanted() -> bool:
    """Whether the environment asks for these operators; they are on unless switched off. Raises InputError."""
    value = os.environ.get(SWITCH, "1")
    if value not in ("0", "1"):
        raise InputError(f"{SWITCH}={value!r} is neither 1 (ICaRus's LoRA operators on CPUs) nor 0 (vLLM's own).")
    return value == "1"


@dataclass(frozen=True)
class Part:
    """Neighbouring rows of a step, some of which have an adapter."""

    rows: slice
    slot: int  # of their adapter; -1: several
    slots: frozenset[int]
    mask: Tensor | None = None  # (rows, M r), for several


@dataclass(frozen=True)
class _Run:
    start: int
    end: int
    slot: int


def parts(slots: Sequence[int], resident: int, rank: int, dtype: torch.dtype) -> list[Part]:
    """The parts of a step.

    Args:
        slots: for each row the slot of its adapter, -1 for none.
        resident: how many slots there are (M).
        rank: columns of each adapter (r); smaller ones are padded with zeros.
        dtype: of the masks.
    """
    found: list[Part] = []
    for cluster in _clusters(slots):
        if len(cluster) <= FEW:
            found += [Part(slice(run.start, run.end), run.slot, frozenset({run.slot})) for run in cluster]
        else:
            rows = slice(cluster[0].start, cluster[-1].end)
            own = torch.tensor(slots[rows.start : rows.stop])
            mask = (own[:, None] == torch.arange(resident)).to(dtype).repeat_interleave(rank, dim=1)
            found.append(Part(rows, -1, frozenset(run.slot for run in cluster), mask))
    return found


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


class Layer:
    """The adapters of one linear layer, whose output has one slice or several (q, k and v are one layer).

    The tensors that vLLM fills when it loads an adapter (``a``, ``b``) are views of memory in which all adapters stand
    side by side, so that a masked product needs no copy.
    """

    def __init__(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
        """
        Args:
            a: per slice (M, 1, r, inputs), as vLLM keeps it (``lora_a_stacked``).
            b: per slice (M, 1, outputs, r).
        """
        with torch.inference_mode(False):  # vLLM also loads adapters outside of it, which then could not write here
            self._a = torch.stack([part.squeeze(1) for part in a])  # (slices, M, r, inputs)
            self._b = [part.squeeze(1).transpose(0, 1).contiguous() for part in b]  # (outputs, M, r) each
        self.a = tuple(part.unsqueeze(1) for part in self._a)
        self.b = tuple(part.transpose(0, 1).unsqueeze(1) for part in self._b)
        self._filled: list[set[int]] = [set() for _ in b]
        self._singles: dict[int, tuple[Tensor, list[Tensor]]] = {}
        for slot in range(self._a.shape[1]):
            self.refresh(slot)

    def refresh(self, slot: int) -> None:
        """Look at the weights in a slot again; to be called after an adapter was put there."""
        for part, filled in zip(self._b, self._filled, strict=True):
            (filled.add if part[:, slot].any() else filled.discard)(slot)
        self._singles.pop(slot, None)

    def add(self, y: Tensor, x: Tensor, found: Sequence[Part]) -> None:
        """Add to the outputs ``y`` (rows, outputs of all slices) what adapters make of ``x`` (rows, inputs)."""
        for part in found:
            filled = [i for i, slots in enumerate(self._filled) if slots & part.slots]
            if not filled:
                continue
            span = range(filled[0], filled[-1] + 1)
            rows = x[part.rows]
            if part.mask is not None:
                deltas = self._masked(rows, part.mask, span)
            elif len(rows) < LONG:
                deltas = self._few(rows, part.slot, span)
            else:
                deltas = self._many(rows, part.slot, span)
            for columns, delta in zip(self._columns(span), deltas, strict=True):
                y[part.rows, columns] += delta

    def _columns(self, span: range) -> Iterator[slice]:
        start = sum(len(part) for part in self._b[: span.start])
        for part in self._b[span.start : span.stop]:
            yield slice(start, start + len(part))
            start += len(part)

    def _masked(self, x: Tensor, mask: Tensor, span: range) -> Iterator[Tensor]:
        inner = x @ self._a[span.start : span.stop].flatten(0, 2).t()
        inner = inner.view(len(x), len(span), -1) * mask[:, None]
        for i, part in enumerate(self._b[span.start : span.stop]):
            yield inner[:, i] @ part.flatten(1).t()

    def _many(self, x: Tensor, slot: int, span: range) -> Iterator[Tensor]:
        for i in span:
            yield (x @ self._a[i, slot].t()) @ self._b[i][:, slot].t()

    def _few(self, x: Tensor, slot: int, span: range) -> Iterator[Tensor]:
        a, b = self._single(slot)
        rank = self._a.shape[2]
        inner = x.float() @ a[span.start * rank : span.stop * rank].t()
        for i, part in enumerate(b[span.start : span.stop]):
            yield inner[:, i * rank : (i + 1) * rank] @ part.t()

    def _single(self, slot: int) -> tuple[Tensor, list[Tensor]]:
        """A (slices r, inputs) and per slice B (outputs, r) of one adapter in float32, kept until weights change."""
        if slot not in self._singles:
            a = self._a[:, slot].flatten(0, 1).float().contiguous()
            self._singles[slot] = a, [part[:, slot].float().contiguous() for part in self._b]
        return self._singles[slot]
