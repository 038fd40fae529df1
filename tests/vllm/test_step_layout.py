"""Decoder rows against a loop over requests that follows the definition and nothing else."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icarus.vllm import step_layout
from icarus.vllm.step_layout import Batch


@dataclass(frozen=True)
class Request:
    """One request in one step, as the scheduler sees it."""

    cached: int  # positions in the cache before this step
    tokens: tuple[int, ...]  # scheduled now
    sampled: int  # of the last ones; 0 in the middle of a prefill
    lora_id: int
    shares: bool


@st.composite
def requests(draw: st.DrawFn) -> Request:
    kind = draw(st.sampled_from(["base", "icarus", "conventional"]))
    tokens = draw(st.lists(st.integers(0, 999), min_size=1, max_size=draw(st.sampled_from([1, 1, 3, 9]))))
    sampled = draw(st.sampled_from([0, 1, 1, 1, len(tokens), draw(st.integers(1, len(tokens)))]))
    # An id tells the kind, as an id of an engine does: odd ones share.
    lora_id = {"base": 0, "icarus": 1 + 2 * draw(st.integers(0, 3)), "conventional": 2 + 2 * draw(st.integers(0, 3))}
    return Request(draw(st.integers(0, 50)), tuple(tokens), sampled, lora_id[kind], kind == "icarus")


BATCHES = st.lists(requests(), min_size=1, max_size=8)
BEHIND = st.one_of(st.none(), st.integers(0, 8))  # how many requests stand before decoder requests; None for all


def batch_of(requests: list[Request], behind: int | None = None) -> Batch:
    return Batch(
        behind=None if behind is None else min(behind, len(requests)),
        starts=np.cumsum([0, *(len(request.tokens) for request in requests)]),
        sampled=np.array([request.sampled for request in requests]),
        lora_ids=np.array([request.lora_id for request in requests]),
        shares=np.array([request.shares for request in requests]),
    )


@dataclass
class Row:
    token: int
    position: int
    request: int
    lora_id: int
    writes: bool
    predicts: bool


def naive(requests: list[Request], behind: int | None = None) -> list[Row]:
    """Every row of the step, by the definition: encoder rows write, decoder rows predict, others do both."""
    rows = []
    numbered = list(enumerate(requests))
    behind = len(requests) if behind is None else behind
    for decoder, part in ((False, numbered[:behind]), (True, numbered), (False, numbered[behind:])):
        for index, request in part:
            for offset, token in enumerate(request.tokens):
                sampled = offset >= len(request.tokens) - request.sampled
                if decoder and not (request.shares and sampled):
                    continue
                lora_id = 0 if request.shares and not decoder else request.lora_id
                predicts = sampled and (decoder or not request.shares)
                rows.append(Row(token, request.cached + offset, index, lora_id, not decoder, predicts))
    return rows


@given(BATCHES, BEHIND)
def test_rows_are_those_of_the_definition(step: list[Request], behind: int | None) -> None:
    batch, wanted = batch_of(step, behind), naive(step, behind)
    planned, scheduled = step_layout.plan(batch), naive(step)[: batch_of(step).scheduled]
    assert len(wanted) == batch.scheduled + len(planned)
    assert planned.scheduled == batch.scheduled
    assert planned.lora_ids.tolist() == [row.lora_id for row in wanted]
    added = wanted[planned.first : planned.first + len(planned)]
    assert [scheduled[source].token for source in planned.sources] == [row.token for row in added]
    assert [scheduled[source].position for source in planned.sources] == [row.position for row in added]
    bounds = [planned.first, *planned.ends.tolist()]
    for request, start, end in zip(planned.requests, bounds[:-1], bounds[1:], strict=True):
        assert [row.request for row in wanted[start:end]] == [request] * (end - start)
        assert not any(row.writes for row in wanted[start:end])


@given(BATCHES, BEHIND)
def test_what_is_read_is_what_predicts(step: list[Request], behind: int | None) -> None:
    batch, wanted = batch_of(step, behind), naive(step, behind)
    planned, scheduled = step_layout.plan(batch), naive(step)
    table, stands = step_layout.predicting_rows(planned), step_layout.scheduled_rows(planned)
    sampled = [
        end - request.sampled + row
        for end, request in zip(batch.starts[1:].tolist(), step, strict=True)
        for row in range(request.sampled)
    ]
    read = table[sampled].tolist()
    assert all(wanted[row].predicts for row in read)
    assert sorted(read) == [index for index, row in enumerate(wanted) if row.predicts]
    assert [(wanted[r].token, wanted[r].position, wanted[r].request) for r in read] == [
        (scheduled[s].token, scheduled[s].position, scheduled[s].request) for s in sampled
    ]
    assert [wanted[row] for row in stands] == scheduled[: batch.scheduled]


@given(BATCHES, st.integers(0, 5), BEHIND)
def test_buffers_hold_decoder_requests_where_they_belong(step: list[Request], padding: int, behind: int | None) -> None:
    batch, wanted = batch_of(step, behind), naive(step, behind)
    planned = step_layout.plan(batch)
    count, extra = batch.requests, len(planned.requests)
    starts = np.full(count + extra + padding + 1, 77)
    starts[: count + 1] = batch.starts
    step_layout.extend_starts(starts, count, planned)
    assert (np.diff(starts) >= 0).all(), "attention kernels need this of the padding too"
    assert starts[: planned.behind + 1].tolist() == batch.starts[: planned.behind + 1].tolist()
    assert set(starts[count + extra :].tolist()) == {batch.scheduled + len(planned)}

    lengths = [request.cached + len(request.tokens) for request in step]
    seq_lens = torch.tensor([*lengths, *[-5] * (extra + padding)])
    tail, tail_rows = step_layout.tails(planned, count)
    step_layout.append_copies(seq_lens, planned.behind, torch.from_numpy(tail))
    owners = [*range(planned.behind), *tail]
    assert seq_lens[: count + extra].tolist() == [lengths[request] for request in owners]
    assert seq_lens[count + extra :].tolist() == [-5] * padding, "padding is the engine's"
    assert np.repeat(owners, np.diff(starts[: count + extra + 1])).tolist() == [row.request for row in wanted]
    tokens = torch.tensor([*(token for request in step for token in request.tokens), *[-5] * len(planned)])
    step_layout.append_copies(tokens, planned.first, torch.from_numpy(tail_rows))
    assert tokens.tolist() == [row.token for row in wanted]
    # The last row of a decoder request sees exactly the context of the row that it doubles.
    for request, end in zip(planned.requests, planned.ends, strict=True):
        assert wanted[end - 1].position == lengths[request] - 1


@given(BATCHES)
def test_others_have_no_decoder_rows_and_keep_their_lora(step: list[Request]) -> None:
    planned = step_layout.plan(batch_of([Request(r.cached, r.tokens, r.sampled, r.lora_id, False) for r in step]))
    assert len(planned) == 0
    assert planned.lora_ids.tolist() == [request.lora_id for request in step for _ in request.tokens]


@given(BATCHES)
def test_a_uniform_decode_stays_uniform(step: list[Request]) -> None:
    """CUDA graphs for decoding need the same number of rows in every request."""
    decodes = [Request(r.cached, r.tokens[:1], 1, r.lora_id, r.shares) for r in step]
    batch = batch_of(decodes)
    planned = step_layout.plan(batch)
    lengths = np.diff([*batch.starts, *planned.ends])
    assert set(lengths.tolist()) == {1}


def test_more_samples_than_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="samples more rows"):
        step_layout.plan(batch_of([Request(0, (1,), 2, 1, True)]))


@given(BATCHES, st.integers(0, 3), BEHIND)
def test_pairs_are_decodes_and_their_decoder_rows(step: list[Request], padding: int, behind: int | None) -> None:
    batch, wanted = batch_of(step, behind), naive(step, behind)
    planned = step_layout.plan(batch)
    starts = np.zeros(batch.requests + len(planned.requests) + padding + 1, dtype=np.int32)
    starts[: batch.requests + 1] = batch.starts
    step_layout.extend_starts(starts, batch.requests, planned)
    first, second = step_layout.pairs(starts, planned)
    decodes = [i for i, request in enumerate(step) if request.shares and len(request.tokens) == request.sampled == 1]
    scheduled, decoders = ([wanted[row] for row in starts[part]] for part in (first, second))
    assert [row.request for row in scheduled] == [row.request for row in decoders] == decodes
    assert all(row.writes for row in scheduled)
    assert not any(row.writes for row in decoders)
    assert (np.diff(starts)[first] == 1).all()
    assert (np.diff(starts)[second] == 1).all()


@given(BATCHES, st.integers(0, 3))
def test_rows_of_a_pair_side_by_side(step: list[Request], padding: int) -> None:
    batch = batch_of(step)
    planned = step_layout.plan(batch)
    starts = np.concatenate([batch.starts, planned.ends, [batch.scheduled + len(planned)] * padding]).astype(np.int32)
    first, second = step_layout.pairs(starts, planned)
    rows = [list(range(*bounds)) for bounds in itertools.pairwise(starts)]
    pairs = {a: rows[a] + rows[b] for a, b in zip(first.tolist(), second.tolist(), strict=True)}
    emptied = set(second.tolist())

    order, merged = step_layout.side_by_side(starts, first, second)
    wanted = [pairs.get(request, [] if request in emptied else rows[request]) for request in range(len(rows))]
    assert [order[a:b].tolist() for a, b in itertools.pairwise(merged)] == wanted

    order, others, of_pairs = step_layout.apart(starts, first, second)
    wanted = [[] if request in pairs or request in emptied else rows[request] for request in range(len(rows))]
    assert [order[a:b].tolist() for a, b in itertools.pairwise(others)] == wanted
    behind = order[others[-1] :]
    wanted = [pairs.get(request, []) for request in range(len(rows))]
    assert [behind[a:b].tolist() for a, b in itertools.pairwise(of_pairs)] == wanted
