"""Decoder rows in vLLM's model runner V2 (``vllm/v1/worker/gpu/model_runner.py``), on any device.

V2 passes one ``InputBatch`` through a step. So decoder rows are a transformation of that batch: it gets requests once
more, with the rows that predict, and attention, padding and CUDA graphs see one ordinary batch. Sampling gets the batch
as it was, with indices that point at decoder rows. vLLM's manager of prefill context parallelism has the same shape
(``pcp_manager.py``): it replaces the batch before the forward pass, and restores it before sampling.

Decoder requests stand behind scheduled decodes and before prefills. Where a prompt is scored they stand behind all.

    gather_batch_req_state    plans the step, when the order of requests is known and nothing has been sized
    dispatch_cg_and_sync_dp   counts decoder rows into padding, CUDA graphs and data-parallel ranks
    prepare_inputs            adds decoder requests and their rows
    prepare_attn              block tables for all requests, slots for scheduled rows alone
    _set_active_loras         scheduled rows on base weights, decoder rows on the adapter
    execute_model             hands the batch as it was to sampling, and ends the plan

Buffers of rows and of block tables have room for decoder requests. What V2 keeps by request (all token ids, and the
sampler's states of the size of the vocabulary) stays at the number of requests that are scheduled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.lora.request import LoRARequest
from vllm.v1.worker.gpu.input_batch import InputBuffers

from icarus.vllm import attended_step, step_layout
from icarus.vllm.counters import count_rows
from icarus.vllm.marks import decoded_ids
from icarus.vllm.patching import Original
from icarus.vllm.state import Attached
from icarus.vllm.step_layout import Batch, DecoderRows, Ints
from icarus.vllm.worker import not_finite
from icarus.vllm.worker.planned import Planned, Planner


@dataclass(frozen=True)
class _Plan:
    """Of a step with requests that share."""

    layout: Planned  # there may be no decoder rows: a prompt in pieces has rows on base weights alone
    requests: dict[int, LoRARequest]  # of all its requests, by LoRA id
    scores: bool  # whether one of these requests scores its prompt

    @property
    def rows(self) -> DecoderRows:
        return self.layout.rows


@dataclass(frozen=True)
class _Extension:
    """Of a batch that has decoder requests."""

    batch: Any  # as it was
    sampled: Any  # the same, with indices of decoder rows to sample from
    layout: Planned


_ROWS = Attached[DecoderRows]("rows")
"""On a CUDA-graph manager, which is what ``dispatch_cg_and_sync_dp`` is given."""

_NO_SLOT = -1
"""Of a row that writes nothing (``PAD_SLOT_ID`` in vllm/v1/attention/backends/utils.py)."""

_EXTENSION = Attached[_Extension]("extension")
"""On an ``InputBatch`` with decoder requests."""


def wrap_gpu_model_runner(original: type) -> type:
    """``GPUModelRunner``: the class that a GPU worker makes its runner of."""
    return _extended_class(original)


def wrap_cpu_model_runner(original: type) -> type:
    """``CPUModelRunner``: the class that a CPU worker makes its runner of."""
    return _extended_class(original)


def _extended_class(original: type) -> type:
    if issubclass(original, DecoderRowsRunner):
        return original
    return type(original.__name__, (DecoderRowsRunner, original), {"__module__": original.__module__})


class DecoderRowsRunner:
    """Goes in front of vLLM's runner class, whose methods it extends; see ledger.py."""

    _decoder_plan: _Plan | None = None
    """Of the step; None during warm-up, in idle steps, and without requests that share."""

    def __init__(self: Any, vllm_config: Any, device: Any) -> None:
        """States by request for those that are scheduled, buffers of a step for decoder requests as well."""
        super().__init__(_without_room(vllm_config), device)  # type: ignore[call-arg]
        self.vllm_config = vllm_config
        self._request_room = vllm_config.scheduler_config.max_num_seqs
        self._planner = Planner(self._request_room, device)
        self.input_buffers = InputBuffers(self._request_room, self.max_num_tokens, device)

    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Block tables and CUDA graphs have room for decoder requests."""
        with _room_for_decoder_requests(self):
            return super().initialize_kv_cache(*args, **kwargs)  # type: ignore[misc]

    def prepare_dummy_attn(self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Dummy batches may have as many requests as a graph, and there are not as many states."""
        input_batch.idx_mapping.clamp_(max=self.max_num_reqs - 1)
        return super().prepare_dummy_attn(input_batch, *args, **kwargs)  # type: ignore[misc]

    # --------------------------------------------------------------------------------------------- plan

    def gather_batch_req_state(self: Any, scheduler_output: Any, dummy_run: bool) -> Any:
        """Plans the step."""
        state, uniform = super().gather_batch_req_state(scheduler_output, dummy_run)  # type: ignore[misc]
        if dummy_run or state is None or not self.lora_config:
            return state, uniform
        requests = _lora_requests(self, state.req_ids)
        shared = decoded_ids(requests)
        if not shared:
            count_rows(self, int(state.num_scheduled_tokens.sum()), 0)
            return state, uniform
        self._decoder_plan = plan = _plan(self, state, requests, shared)
        count_rows(self, plan.rows.scheduled, len(plan.rows))
        if not len(plan.rows):
            return state, uniform
        step_layout.check_room(plan.rows, len(state.req_ids), self.max_num_tokens, self._request_room)
        _ROWS.set(self.cudagraph_manager, plan.rows)
        attended_step.begin(plan.rows)
        decoder_lengths = np.diff(plan.rows.ends, prepend=plan.rows.first)
        alike = (decoder_lengths == state.num_scheduled_tokens[plan.rows.requests]).all()
        return state, uniform if alike else None

    @torch.inference_mode()
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Cleans blocks that need it, hands the batch as it was to sampling, and drops the plan when the step ends."""
        not_finite.clean(self, scheduler_output)
        try:
            output = super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
            state = self.execute_model_state
            if state is not None and not _is_dummy(*args, **kwargs):
                _finish(self, state, state.hidden_states if output is None else output)
            return output
        finally:
            if self._decoder_plan:
                _ROWS.set(self.cudagraph_manager, None)
                attended_step.begin(None)
                self._decoder_plan = None

    # --------------------------------------------------------------------------------------------- write

    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Adds decoder requests and their rows to the batch."""
        with _room_for_decoder_requests(self):
            batch = super().prepare_inputs(*args, **kwargs)  # type: ignore[misc]
            return (
                _extend(self, batch, self._decoder_plan.layout)
                if self._decoder_plan and len(self._decoder_plan.rows)
                else batch
            )

    def prepare_attn(self: Any, input_batch: Any) -> Any:
        """Decoder requests read the blocks of their sources, and their rows have slot -1: they write nothing."""
        tables, slots = super().prepare_attn(input_batch)  # type: ignore[misc]
        if extension := _EXTENSION.get(input_batch):
            rows = extension.layout.rows
            slots[:, rows.first : rows.first + len(rows)] = _NO_SLOT
        return tables, slots

    def _set_active_loras(self: Any, per_sample: Any, per_row: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
        """Maps the rows of a planned step; sampled rows are mapped by request, as in vLLM."""
        if plan := self._decoder_plan:
            per_row, rows = plan.layout.lora_ids, plan.rows
            per_sample = per_sample[: rows.behind] + per_sample[rows.behind + len(rows.requests) :]
            # vLLM has a set, in which requests are equal by name, and an adapter that was loaded again has two ids.
            requests = list(plan.requests.values())
        return super()._set_active_loras(per_sample, per_row, requests, *args, **kwargs)  # type: ignore[misc]


def _is_dummy(_: Any = None, dummy_run: bool = False, *__: Any, **___: Any) -> bool:
    """Whether ``execute_model`` was called for warm-up or by an idle data-parallel rank."""
    return dummy_run


# ------------------------------------------------------------------------------------------------- size


def _without_room(vllm_config: Any) -> Any:
    """The configuration with ``max_num_seqs`` as before ``limits.reserve_room``."""
    scheduler, config = copy(vllm_config.scheduler_config), copy(vllm_config)
    scheduler.max_num_seqs = scheduler.max_num_active_seqs or scheduler.max_num_seqs
    config.scheduler_config = scheduler
    return config


@contextmanager
def _room_for_decoder_requests(runner: Any) -> Iterator[None]:
    """Buffers that vLLM sizes here have room for decoder requests."""
    scheduled, runner.max_num_reqs = runner.max_num_reqs, runner._request_room
    try:
        yield
    finally:
        runner.max_num_reqs = scheduled


def wrap_dispatch_cg_and_sync_dp(original: Original) -> Original:
    """``dispatch_cg_and_sync_dp``: padding, CUDA graphs and data-parallel ranks count decoder rows.

    LoRA kernels count adapters by id, and "none", with which scheduled rows run, as one more. vLLM counts requests by
    name, of which an adapter that was loaded again has one for two ids.
    """

    @wraps(original)
    def dispatch_cg_and_sync_dp(
        cudagraph_manager: Any, num_reqs: int, num_tokens: int, *args: Any, num_active_loras: int = 0, **kwargs: Any
    ) -> Any:
        if rows := _ROWS.get(cudagraph_manager):
            num_reqs, num_tokens = num_reqs + len(rows.requests), num_tokens + len(rows)
            num_active_loras = len(np.unique(rows.lora_ids))
        return original(cudagraph_manager, num_reqs, num_tokens, *args, num_active_loras=num_active_loras, **kwargs)

    return dispatch_cg_and_sync_dp


# ------------------------------------------------------------------------------------------------- plan


def _lora_requests(runner: Any, names: list[str]) -> dict[int, LoRARequest]:
    """The LoRA requests of a step by LoRA id. Equal by name, an adapter that was loaded again has two."""
    known = runner.lora_state.lora_requests
    if not known:
        return {}
    return {request.lora_int_id: request for name in names if (request := known.get(name))}


def _plan(runner: Any, state: Any, requests: dict[int, LoRARequest], shared: set[int]) -> _Plan:
    """The plan of a step.

    Args:
        runner: vLLM's model runner.
        state: its ``BatchReqState``; arrays have one entry per request.
        requests: LoRA requests of the step, by LoRA id.
        shared: LoRA ids of adapters that share.
    """
    index, scheduled = state.idx_mapping_np, state.num_scheduled_tokens
    lora_ids = runner.lora_state.lora_ids[index].astype(np.int64)
    shares = np.fromiter(map(shared.__contains__, lora_ids), dtype=np.bool_, count=len(lora_ids))
    drafts = 0 if state.num_draft_tokens_np is None else state.num_draft_tokens_np
    computed = runner.req_states.num_computed_tokens_np[index]
    last = computed + scheduled >= state.prefill_len_np  # of a prompt, or behind it
    sampled = np.where(last, runner.model_state.num_new_sampled_tokens_per_step + drafts, 0)
    scored = _scored(runner, state) & (computed < runner.req_states.prompt_len.np[index])
    sampled = np.where(scored, scheduled, sampled)
    starts = np.concatenate([[0], np.cumsum(scheduled)])
    behind = None if scored.any() or _counts_rows(runner) else _decodes(scheduled, runner.decode_query_len)
    layout = runner._planner.plan(Batch(starts, sampled, lora_ids, shares, behind))
    return _Plan(layout, requests, bool((scored & shares).any()))


def _counts_rows(runner: Any) -> bool:
    """Whether something keeps values by the numbers of scheduled rows, which must not move then.

    vLLM's scores of prompts do as well (``_scored``). Multimodal models do from the embedding of a step to its forward
    pass (DeepStack, masks of images), and so does the report of a mixture's experts
    (``--enable-return-routed-experts``).
    """
    return bool(runner.supports_mm_inputs or runner.aux_output_connector is not None)


def _decodes(lengths: Ints, most: int) -> int:
    """How many requests at the front have ``most`` rows or fewer: vLLM's order (``sort_batch_req_ids``) has all there.

    Decoder requests have no more. Behind these, attention backends with a kernel for decodes (FlashInfer) take them for
    decodes (``split_decodes_and_prefills``), and behind prefills for prefills.
    """
    longer = lengths > most
    return int(longer.argmax()) if longer.any() else len(lengths)


def _scored(runner: Any, state: Any) -> Any:
    """(requests,), whether the prompt is scored: with ``prompt_logprobs``, or ``prompt_logprob_token_ids``."""
    worker = runner.prompt_logprobs_worker
    scored = worker.uses_prompt_logprobs[state.idx_mapping_np]
    if chosen := worker.token_id_scores:
        scored = scored | np.fromiter(map(chosen.__contains__, state.req_ids), np.bool_, len(state.req_ids))
    return scored


# ------------------------------------------------------------------------------------------------- write


def _extend(runner: Any, batch: Any, layout: Planned) -> Any:
    """An ``InputBatch`` with decoder requests behind the scheduled decodes, and their rows behind their rows."""
    rows = layout.rows
    requests, tokens = batch.num_reqs + len(rows.requests), batch.num_tokens + len(rows)
    padded_requests = max(batch.num_reqs_after_padding, requests)
    padded_tokens = max(batch.num_tokens_after_padding, tokens)
    if rows.behind < batch.num_reqs:  # scheduled rows will move in buffers of which these are views
        views = ("query_start_loc", "seq_lens", "input_ids")
        batch = replace(batch, **{name: getattr(batch, name).clone() for name in views})
    buffers, starts, spread = runner.input_buffers, layout.starts.copy(), _spread(layout)
    _write(buffers, layout, batch.num_reqs, tokens)
    lengths = np.diff(starts[: requests + 1])
    longest = np.zeros(padded_requests, dtype=np.int32)
    longest[:requests] = spread(batch.seq_lens_cpu_upper_bound[: batch.num_reqs].numpy())
    computed = spread(batch.num_computed_tokens_np)
    decoders = slice(rows.behind, rows.behind + len(rows.requests))
    computed[decoders] = longest[decoders] - lengths[decoders]
    of_rows = {name: getattr(buffers, name)[:padded_tokens] for name in ("input_ids", "positions", "is_padding")}
    extended = replace(
        batch,
        req_ids=[batch.req_ids[request] for request in spread(np.arange(batch.num_reqs))],
        num_reqs=requests,
        num_reqs_after_padding=padded_requests,
        idx_mapping=torch.cat([batch.idx_mapping[: rows.behind], batch.idx_mapping[layout.requests]]),
        idx_mapping_np=spread(batch.idx_mapping_np),
        num_scheduled_tokens=lengths,
        num_tokens=tokens,
        num_tokens_after_padding=padded_tokens,
        query_start_loc=buffers.query_start_loc[: padded_requests + 1],
        query_start_loc_np=starts[: padded_requests + 1],
        seq_lens=buffers.seq_lens[:padded_requests],
        seq_lens_cpu_upper_bound=torch.from_numpy(longest),
        num_computed_tokens_np=computed,
        prefill_len_np=spread(batch.prefill_len_np),
        num_computed_prefill_tokens_np=spread(batch.num_computed_prefill_tokens_np),
        is_prefilling_np=spread(batch.is_prefilling_np),
        **of_rows,
    )
    sampled = replace(batch, logits_indices=layout.predicting[batch.logits_indices], **of_rows)
    _EXTENSION.set(extended, _Extension(batch, sampled, layout))
    return extended


def _write(buffers: Any, layout: Planned, requests: int, tokens: int) -> None:
    """Write decoder requests and rows between those of a batch, or behind them."""
    first, sources = layout.rows.first, layout.sources
    buffers.query_start_loc.copy_(layout.starts_on_device)
    step_layout.append_copies(buffers.input_ids, first, sources)
    step_layout.append_copies(buffers.positions, first, sources)
    step_layout.append_copies(buffers.seq_lens, layout.rows.behind, layout.requests)
    buffers.is_padding[:tokens] = False


def _spread(layout: Planned) -> Any:
    """A function from an array by scheduled request to one by request of the step."""
    behind, (tail, _) = layout.rows.behind, layout.tails
    return lambda values: np.concatenate([values[:behind], values[tail]])


def wrap_prepare_inputs_embeds(original: Original) -> Original:
    """``DefaultModelState.prepare_inputs_embeds``: decoder rows get the embeddings of their sources."""

    @wraps(original)
    def prepare_inputs_embeds(self: Any, scheduled_encoder_inputs: Any, input_batch: Any, req_states: Any) -> Any:
        extension = _EXTENSION.get(input_batch)
        if extension is None:
            return original(self, scheduled_encoder_inputs, input_batch, req_states)
        padded = replace(extension.batch, num_tokens_after_padding=input_batch.num_tokens_after_padding)
        embeddings = original(self, scheduled_encoder_inputs, padded, req_states)
        step_layout.append_copies(embeddings, extension.layout.rows.first, extension.layout.sources)
        return embeddings

    return prepare_inputs_embeds


def wrap_prepare_inputs(original: Original) -> Original:
    """``DefaultModelState.prepare_inputs``: decoder rows get the positions of their sources, with M-RoPE as well."""

    @wraps(original)
    def prepare_inputs(self: Any, input_batch: Any, req_states: Any) -> Any:
        extension = _EXTENSION.get(input_batch)
        if extension is None or self.rope_state is None:
            return original(self, input_batch, req_states)
        padded = replace(extension.batch, num_tokens_after_padding=input_batch.num_tokens_after_padding)
        inputs = original(self, padded, req_states)
        step_layout.append_copies(inputs["positions"].T, extension.layout.rows.first, extension.layout.sources)
        return inputs

    return prepare_inputs


def _finish(runner: Any, state: Any, hidden: Any) -> None:
    """Give sampling the batch as it was, and prompt logprobs the hidden states of decoder rows."""
    plan = runner._decoder_plan
    not_finite.note(runner, hidden, _Step(runner, state.input_batch, plan))
    extension = _EXTENSION.get(state.input_batch)
    if extension is None:
        return
    if plan.scores:  # vLLM computes them from scheduled rows, which have not moved
        rows = plan.rows
        decoded = hidden[rows.scheduled : rows.scheduled + len(rows)].clone()  # a view of what is written to
        hidden[plan.layout.sources] = decoded
    runner.execute_model_state = state._replace(input_batch=extension.sampled)


@dataclass(frozen=True)
class _Step:
    """A step as ``not_finite.Step`` describes it."""

    runner: Any
    batch: Any
    plan: _Plan | None

    @property
    def count(self) -> int:
        return int(self.batch.num_tokens)

    @property
    def takes_embeddings(self) -> bool:
        return bool(self.runner.uses_inputs_embeds)

    def requests(self) -> dict[int, LoRARequest]:
        return self.plan.requests if self.plan else _lora_requests(self.runner, self.batch.req_ids)

    def lora_ids(self) -> Ints:
        if self.plan:
            return self.plan.rows.lora_ids
        lora_ids: Ints = self.runner.lora_state.lora_ids[self.batch.idx_mapping_np]
        return np.repeat(lora_ids, self.batch.num_scheduled_tokens)

    def slots(self) -> Iterator[tuple[Tensor, int]]:
        tables = self.runner.block_tables
        yield from zip(tables.slot_mappings, tables.block_sizes, strict=True)
