"""Which decoder rows a step needs, and where they stand: arithmetic over plain arrays, without vLLM.

vLLM lays out the rows of a step request by request: ``starts`` (its ``query_start_loc``) has one entry per request, and
the end. Scheduled rows of a request whose adapter shares are encoder rows: they run on base weights and write K/V. For
every position at which such a request samples or scores, a decoder row is appended behind the last scheduled row. The
scheduled row at that position is its source. The decoder rows of one request form a request of their own, with the same
block table and the same context length. Attention backends that read the cache compute it like any other request
(engine/limits.py refuses the rest). Its slots are -1, so it writes nothing.

    scheduled   | a a a | b | c c |            starts      0 3 4 6
    decoder                         | b | c |  ends                7 8     (a is in mid-prefill: it samples nothing)

Requests for the base model and for conventional LoRA adapters have no decoder rows; the latter run with their LoRA on
scheduled rows. No decoder row reads what another one computes, so their order does not matter. Some attention backends
have a kernel for requests of a row or two, which they expect in front of longer ones. So decoder requests may also
stand between scheduled ones, which are then moved on:

    scheduled   | b | a a a | c c |            starts      0 1 4 6
    the step    | b | b | c | a a a | c c |    ends            2 3        (behind one request)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

Ints = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]

BASE_LORA_ID = 0
"""LoRA id of rows that run on base weights alone; an adapter's id is at least 1 (vllm/lora/request.py)."""


@dataclass(frozen=True)
class Batch:
    """What the scheduler put into one step. Arrays have one entry per request; ``starts`` has one more."""

    starts: Ints  # first row of each request, and the end
    sampled: Ints  # how many of its last rows each request samples from or scores; 0 if the sample is discarded
    lora_ids: Ints  # BASE_LORA_ID for the base model
    shares: Bools  # whether the request's adapter shares the cache
    behind: int | None = None  # how many requests stand before decoder requests; None for all

    @property
    def requests(self) -> int:
        """Number of requests."""
        return len(self.starts) - 1

    @property
    def scheduled(self) -> int:
        """Number of scheduled rows."""
        return int(self.starts[-1])


@dataclass(frozen=True)
class DecoderRows:
    """The decoder rows of one step."""

    requests: Ints  # for each decoder request: its source, among the scheduled requests
    sources: Ints  # for each decoder row: its source, among the scheduled rows
    ends: Ints  # for each decoder request: the row behind its last one, counted from the step's first row
    lora_ids: Ints  # for each row of the step
    behind: int  # how many scheduled requests stand before them
    first: int  # how many scheduled rows do

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def scheduled(self) -> int:
        """Number of scheduled rows."""
        return len(self.lora_ids) - len(self.sources)


def plan(batch: Batch) -> DecoderRows:
    """The decoder rows of a step, as the head of this file describes them.

    Raises:
        ValueError: a request samples more rows than it has.
    """
    lengths = np.diff(batch.starts)
    counts = np.where(batch.shares, batch.sampled, 0)
    if (counts > lengths).any():
        raise ValueError(f"A request samples more rows ({counts.tolist()}) than it has ({lengths.tolist()}).")
    requests = np.flatnonzero(counts)
    counts = counts[requests]
    ends = np.cumsum(counts)
    # The source of a decoder request's row j is row j among the last ``count`` rows of its source request.
    sources = np.arange(counts.sum()) + np.repeat(batch.starts[1:][requests] - ends, counts)
    scheduled_ids = np.repeat(np.where(batch.shares, BASE_LORA_ID, batch.lora_ids), lengths)
    behind = batch.requests if batch.behind is None else batch.behind
    first = int(batch.starts[behind])
    decoder_ids = np.repeat(batch.lora_ids[requests], counts)
    lora_ids = np.concatenate([scheduled_ids[:first], decoder_ids, scheduled_ids[first:]])
    return DecoderRows(requests, sources, first + ends, lora_ids, behind, first)


def check_room(rows: DecoderRows, scheduled_requests: int, most_rows: int, most_requests: int) -> None:
    """Whether a step fits into buffers, for which ``engine/limits.py`` has made room.

    Raises:
        RuntimeError: it does not, and would be written beyond their ends.
    """
    tokens, requests = rows.scheduled + len(rows), scheduled_requests + len(rows.requests)
    if tokens > most_rows or requests > most_requests:
        raise RuntimeError(
            f"No room for decoder rows: the step has {tokens} rows of {requests} requests, and buffers hold "
            f"{most_rows} and {most_requests}; raise --max-num-batched-tokens and --max-num-seqs."
        )


def scheduled_rows(rows: DecoderRows) -> Ints:
    """For each scheduled row, where it stands in the step."""
    table = np.arange(rows.scheduled)
    table[rows.first :] += len(rows)
    return table


def predicting_rows(rows: DecoderRows) -> Ints:
    """For each scheduled row, the row whose hidden state predicts the next token: its decoder row, or itself."""
    table = scheduled_rows(rows)
    table[rows.sources] = rows.first + np.arange(len(rows))
    return table


def tails(rows: DecoderRows, requests: int) -> tuple[Ints, Ints]:
    """What stands in the step from the first decoder request on, as scheduled: repeated, or moved on.

    Args:
        rows: of the step.
        requests: how many are scheduled.

    Returns:
        Which of the scheduled requests, and which of the scheduled rows.
    """
    moved, moved_rows = np.arange(rows.behind, requests), np.arange(rows.first, rows.scheduled)
    return np.concatenate([rows.requests, moved]), np.concatenate([rows.sources, moved_rows])


def pairs(starts: Ints, rows: DecoderRows) -> tuple[Ints, Ints]:
    """Requests with one scheduled row and one decoder row, and the decoder requests that hold the latter.

    Args:
        starts: of all requests of the step, decoder requests included; padding may follow.
        rows: of the step.

    Returns:
        Two arrays of the same length: requests, and their decoder requests.
    """
    lengths = np.diff(starts)
    decoders = np.searchsorted(starts, rows.ends) - 1
    requests = rows.requests + len(rows.requests) * (rows.requests >= rows.behind)
    single = (lengths[requests] == 1) & (lengths[decoders] == 1)
    # Chunked attention (Llama 4) splits a request into several and renumbers all of them: leave those out.
    last = rows.sources[rows.ends - rows.first - 1]
    single &= starts[requests] == last + len(rows) * (last >= rows.first)
    return requests[single], decoders[single]


def side_by_side(starts: Ints, first: Ints, second: Ints) -> tuple[Ints, Ints]:
    """The rows of a step in an order in which those of a pair are neighbours, as two rows of one request.

    Args:
        starts: of all requests of the step.
        first: (pairs,), requests with one row.
        second: (pairs,), requests with one row as well, which goes to the request in ``first``.

    Returns:
        For each row, which row of the step it is; and ``starts`` of the same requests, where those in ``second``
        have no row.
    """
    lengths = np.diff(starts)
    owners = np.repeat(np.arange(len(lengths)), lengths)
    owners[starts[second]] = first
    lengths[first], lengths[second] = 2, 0
    return np.argsort(owners, kind="stable"), _starts(lengths)


def apart(starts: Ints, first: Ints, second: Ints) -> tuple[Ints, Ints, Ints]:
    """The same with all pairs behind the other rows.

    Returns:
        For each row, which row of the step it is; ``starts`` of the same requests, where only those without a pair have
        rows; and ``starts`` where only those with a pair have rows, two each, counted from the first pair.
    """
    lengths = np.diff(starts)
    of_pairs = np.zeros_like(lengths)
    of_pairs[first] = 2
    lengths[first] = lengths[second] = 0
    rows = np.stack((starts[first], starts[second]), axis=1).reshape(-1)
    others = np.delete(np.arange(starts[-1]), rows)
    return np.concatenate([others, rows]), _starts(lengths), _starts(of_pairs)


def _starts(lengths: Ints) -> Ints:
    return np.concatenate([[0], np.cumsum(lengths)])


def extend_starts(starts: Ints, requests: int, rows: DecoderRows) -> None:
    """Write decoder requests into a buffer of ``starts`` that has ``requests`` requests, and pad with the last end.

    Attention kernels need padding of ``query_start_loc`` that does not decrease (v1/worker/gpu_model_runner.py:2018).
    """
    first, more = rows.behind + 1, len(rows.ends)
    starts[first + more : requests + more + 1] = starts[first : requests + 1] + len(rows)
    starts[first : first + more] = rows.ends
    starts[requests + more + 1 :] = starts[requests + more]


def append_copies(values: Tensor, count: int, sources: Tensor) -> None:
    """Copy rows ``sources`` of a buffer to the places behind its first ``count`` rows, which may be among them."""
    values[count : count + len(sources)] = values[sources]
