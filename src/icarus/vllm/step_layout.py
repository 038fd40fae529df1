"""Which decoder rows a step needs, and where they stand: arithmetic over plain arrays, without vLLM.

vLLM lays the rows of a step out request after request: ``starts`` (its ``query_start_loc``) has one entry per request
and the end. Scheduled rows of a request whose adapter shares the cache are encoder rows: base weights, and they write
K/V. For every position at which such a request samples (or scores) a decoder row is appended behind the last scheduled
row. The decoder rows of one request form a request of their own with the same block table and the same length of
context, which attention backends that read the cache compute like any other (limits.py refuses the rest); their slot
is -1, so they write nothing.

    scheduled   | a a a | b | c c |            starts      0 3 4 6
    decoder                         | b | c |  ends                7 8     (a is in mid-prefill: it samples nothing)

Requests of the base model and of conventional LoRA adapters have no decoder rows; the latter keep their LoRA on their
scheduled rows. A decoder row reads nothing that another decoder row computes, so their order does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

Ints = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]

BASE_LORA_ID = 0
"""LoRA id of rows that run on base weights alone (vllm/lora/request.py: an adapter's id is at least 1)."""


@dataclass(frozen=True)
class Batch:
    """What the scheduler put into one step; one entry per request but for ``starts``."""

    starts: Ints  # first row of each request, and the end: one entry more
    sampled: Ints  # how many of its last rows each request samples from or scores; 0 where that is thrown away
    lora_ids: Ints  # 0 for the base model
    shares: Bools  # whether the request's adapter shares the cache

    @property
    def requests(self) -> int:
        """How many requests there are."""
        return len(self.starts) - 1

    @property
    def scheduled(self) -> int:
        """How many rows there are."""
        return int(self.starts[-1])


@dataclass(frozen=True)
class Rows:
    """The decoder rows of one step."""

    requests: Ints  # per decoder request: the request that it doubles
    sources: Ints  # per decoder row: the scheduled row that it doubles
    ends: Ints  # per decoder request: the row behind its last one, counted from the step's first row
    lora_ids: Ints  # of all rows of the step, scheduled ones first

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def scheduled(self) -> int:
        """How many rows stand before them."""
        return len(self.lora_ids) - len(self.sources)


def plan(batch: Batch) -> Rows:
    """The decoder rows of a step; see the head of this file."""
    lengths = np.diff(batch.starts)
    counts = np.where(batch.shares, batch.sampled, 0)
    if (counts > lengths).any():
        raise ValueError(f"A request samples more rows ({counts.tolist()}) than it has ({lengths.tolist()}).")
    requests = np.flatnonzero(counts)
    counts = counts[requests]
    ends = np.cumsum(counts)
    # Row j of a decoder request doubles row j of the last ``count`` rows of its request.
    sources = np.arange(counts.sum()) + np.repeat(batch.starts[1:][requests] - ends, counts)
    scheduled_ids = np.repeat(np.where(batch.shares, BASE_LORA_ID, batch.lora_ids), lengths)
    lora_ids = np.concatenate([scheduled_ids, np.repeat(batch.lora_ids[requests], counts)])
    return Rows(requests, sources, batch.scheduled + ends, lora_ids)


def readers(rows: Rows) -> Ints:
    """For each scheduled row the row whose hidden state predicts the next token: its decoder row, or itself."""
    table = np.arange(rows.scheduled)
    table[rows.sources] = rows.scheduled + np.arange(len(rows))
    return table


def pairs(starts: Ints, rows: Rows) -> tuple[Ints, Ints]:
    """Requests that have one scheduled row and one decoder row, and the decoder requests with these.

    Args:
        starts: of the whole step, decoder requests included, and perhaps padding behind.
        rows: of the step.
    """
    lengths = np.diff(starts)
    decoders = np.searchsorted(starts, rows.ends) - 1
    single = (lengths[rows.requests] == 1) & (lengths[decoders] == 1)
    # Attention by chunks of positions (Llama 4) makes several requests of one and counts them anew: such are left out.
    single &= starts[rows.requests] == rows.sources[rows.ends - rows.scheduled - 1]
    return rows.requests[single], decoders[single]


def extend_starts(starts: Ints, requests: int, rows: Rows) -> None:
    """Continue a buffer of ``starts`` behind ``requests`` requests; what follows is padded with the last end.

    Attention kernels need the padding of ``query_start_loc`` not to decrease (v1/worker/gpu_model_runner.py:2018).
    """
    starts[requests + 1 : requests + 1 + len(rows.ends)] = rows.ends
    starts[requests + 1 + len(rows.ends) :] = rows.ends[-1] if len(rows.ends) else starts[requests]


def double(values: Tensor, count: int, sources: Tensor) -> None:
    """Copy the rows ``sources`` of a buffer behind its first ``count`` rows."""
    values[count : count + len(sources)] = values[sources]
