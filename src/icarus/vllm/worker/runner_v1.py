"""Decoder rows in vLLM's model runner (V1, ``vllm/v1/worker/gpu_model_runner.py``), on any device.

A step is planned where vLLM maps rows to LoRA ids, because all that the plan needs is known there and nothing has been
sized yet. From there on, every function that lays out the step is told of more rows and more requests, and the decoder
rows are written into the runner's persistent buffers behind the scheduled rows. So padding, CUDA graphs and
data-parallel coordination see one ordinary batch, and a batch that only decodes stays uniform. Nothing is copied back,
except for prompt logprobs: the indices of the rows to sample from point at decoder rows.

In a step without a request that shares, each function is vLLM's, after a look at one attribute.

Each ``wrap_`` function takes a method of vLLM and returns its replacement; see ledger.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.lora.request import LoRARequest

from icarus.vllm import attended_step, step_layout
from icarus.vllm.counters import count_rows
from icarus.vllm.marks import decoded_ids
from icarus.vllm.patching import Original
from icarus.vllm.state import Attached
from icarus.vllm.step_layout import Batch, DecoderRows, Ints
from icarus.vllm.worker import not_finite
from icarus.vllm.worker.planned import Planned, Planner

_PLANNED = Attached[Planned]("planned")
"""On a runner: its step with decoder rows. None during warm-up, in idle steps, and if no request needs any."""

_PLANNER = Attached[Planner]("planner")
"""On a runner."""


def _rows(runner: Any) -> DecoderRows | None:
    """The decoder rows of a step."""
    planned = _PLANNED.get(runner)
    return planned.rows if planned else None


# ------------------------------------------------------------------------------------------------- plan


def wrap_set_active_loras(original: Original) -> Original:
    """``set_active_loras``: plans the step, and maps its rows to LoRA ids."""

    @wraps(original)
    def set_active_loras(
        self: Any, input_batch: Any, num_scheduled_tokens: Any, num_sampled_tokens: Any = None, *args: Any, **kw: Any
    ) -> Any:
        shared = decoded_ids(input_batch.lora_id_to_lora_request)
        if not shared:
            count_rows(self, int(num_scheduled_tokens.sum()), 0)
            return original(self, input_batch, num_scheduled_tokens, num_sampled_tokens, *args, **kw)
        count = input_batch.num_reqs
        sampled = np.ones(count, dtype=np.int32) if num_sampled_tokens is None else num_sampled_tokens
        planned = _plan(self, input_batch, shared, num_scheduled_tokens, sampled)
        rows = planned.rows
        count_rows(self, rows.scheduled, len(rows))
        if len(rows):
            step_layout.check_room(rows, count, self.max_num_tokens, self.max_num_reqs)
            _PLANNED.set(self, planned)
        # A list, where vLLM has a set: requests are equal by name, and an adapter that was loaded again has two ids.
        requests = list(input_batch.lora_id_to_lora_request.values())
        per_sample = tuple(np.repeat(input_batch.request_lora_mapping[:count], sampled).tolist())
        return self._set_active_loras(per_sample, planned.lora_ids, requests, *args, **kw)

    return set_active_loras


def _plan(runner: Any, batch: Any, shared: set[int], scheduled: Any, sampled: Any) -> Planned:
    """The plan of a step.

    Args:
        runner: vLLM's model runner.
        batch: its ``InputBatch``.
        shared: LoRA ids of adapters that share.
        scheduled: number of scheduled rows of each request.
        sampled: number of sampled rows of each request.
    """
    count = batch.num_reqs
    lora_ids = batch.request_lora_mapping[:count]
    # np.isin takes six times as long for 16 requests, in every step.
    shares = np.fromiter(map(shared.__contains__, lora_ids), dtype=np.bool_, count=count)
    needed = np.where(runner.discard_request_mask.np[:count], 0, sampled)
    if scored := runner.num_prompt_logprobs:
        needed = np.where([request_id in scored for request_id in batch.req_ids], scheduled, needed)
    starts = np.concatenate([[0], np.cumsum(scheduled)])
    planner = _PLANNER.get_or_make(runner, lambda: Planner(runner.max_num_reqs, runner.device))
    return planner.plan(Batch(starts, needed, lora_ids, shares))


def wrap_execute_model(original: Original) -> Original:
    """``execute_model``: cleans blocks that need it, and drops the plan when the step ends.

    So warm-up and idle steps have no plan.
    """

    @wraps(original)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        not_finite.clean(self, scheduler_output)
        try:
            return original(self, scheduler_output, *args, **kwargs)
        finally:
            _PLANNED.set(self, None)

    return execute_model


# ------------------------------------------------------------------------------------------------- write


def wrap_prepare_inputs(original: Original) -> Original:
    """``_prepare_inputs``: adds decoder requests to buffers per request, and has sampling read decoder rows."""

    @wraps(original)
    def _prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        logits_indices, *others = original(self, scheduler_output, num_scheduled_tokens)
        if planned := _PLANNED.get(self):
            _write_requests(self, planned)
            logits_indices = planned.predicting[logits_indices]
        return logits_indices, *others

    return _prepare_inputs


def _write_requests(runner: Any, planned: Planned) -> None:
    batch, count, rows = runner.input_batch, runner.input_batch.num_reqs, planned.rows
    step_layout.extend_starts(runner.query_start_loc.np, count, rows)
    runner.query_start_loc.copy_to_gpu()
    on_host = torch.from_numpy(rows.requests)
    # Attention backends plan by these host copies of the lengths (max_seq_len, is_prefilling).
    for values in (
        runner.optimistic_seq_lens_cpu,
        batch.num_computed_tokens_cpu_tensor,
        batch.num_prompt_tokens_cpu_tensor,
    ):
        step_layout.append_copies(values, count, on_host)
    step_layout.append_copies(runner.seq_lens, count, planned.requests)
    for table in batch.block_table.block_tables:
        longest = int(table.num_blocks_per_row[rows.requests].max())
        step_layout.append_copies(table.block_table.gpu[:, :longest], count, planned.requests)


def wrap_preprocess(original: Original) -> Original:
    """``_preprocess``: writes token ids, positions and embeddings of decoder rows.

    They are written after vLLM has cleared positions behind the scheduled rows. It returns views of the same buffers.
    """

    @wraps(original)
    def _preprocess(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, scheduler_output, *args, **kwargs)
        if planned := _PLANNED.get(self):
            _write_rows(self, planned.rows.scheduled, planned.sources)
        return result

    return _preprocess


def _write_rows(runner: Any, count: int, sources: Tensor) -> None:
    step_layout.append_copies(runner.input_ids.gpu, count, sources)
    if runner.uses_mrope:
        step_layout.append_copies(runner.mrope_positions.gpu.T, count, sources)
    else:
        step_layout.append_copies(runner.positions, count, sources)
    if runner.supports_mm_inputs or runner.enable_prompt_embeds:
        step_layout.append_copies(runner.inputs_embeds.gpu, count, sources)


def wrap_model_forward(original: Original) -> Original:
    """``_model_forward``: notes rows that are not finite, and copies hidden states of decoder rows for prompt logprobs.

    vLLM computes prompt logprobs from scheduled rows. Sampling needs no copy.
    """

    @wraps(original)
    def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = original(self, *args, **kwargs)
        not_finite.note(self, hidden, _Step(self, _rows(self)))
        if (planned := _PLANNED.get(self)) and self.num_prompt_logprobs:
            rows = planned.rows
            decoded = hidden[rows.scheduled : rows.scheduled + len(rows)].clone()  # a view of what is written to
            hidden[planned.sources] = decoded
        return hidden

    return _model_forward


@dataclass(frozen=True)
class _Step:
    """A step as ``not_finite.Step`` describes it."""

    runner: Any
    rows: DecoderRows | None

    @property
    def count(self) -> int:
        if self.rows:
            return len(self.rows.lora_ids)
        return int(self.runner.query_start_loc.np[self.runner.input_batch.num_reqs])

    @property
    def takes_embeddings(self) -> bool:
        return bool(self.runner.enable_prompt_embeds or self.runner.supports_mm_inputs)

    def requests(self) -> dict[int, LoRARequest]:
        requests: dict[int, LoRARequest] = self.runner.input_batch.lora_id_to_lora_request
        return requests

    def lora_ids(self) -> Ints:
        if self.rows:
            return self.rows.lora_ids
        count = self.runner.input_batch.num_reqs
        lengths = np.diff(self.runner.query_start_loc.np[: count + 1])
        return np.repeat(self.runner.input_batch.request_lora_mapping[:count], lengths)

    def slots(self) -> Iterator[tuple[Tensor, int]]:
        groups = self.runner.kv_cache_config.kv_cache_groups
        for group, table in zip(groups, self.runner.input_batch.block_table.block_tables, strict=False):
            yield table.slot_mapping.gpu, group.kv_cache_spec.block_size


# ------------------------------------------------------------------------------------------------- size


def wrap_determine_batch_execution_and_padding(original: Original) -> Original:
    """``_determine_batch_execution_and_padding``: padding, CUDA graphs and data-parallel ranks count decoder rows.

    Scheduled rows run without LoRA beside decoder rows with it, and LoRA kernels count "none" as one more adapter.
    """

    @wraps(original)
    def _determine_batch_execution_and_padding(self: Any, num_tokens: int, num_reqs: int, *args: Any, **kw: Any) -> Any:
        if rows := _rows(self):
            num_tokens, num_reqs = num_tokens + len(rows), num_reqs + len(rows.requests)
            kw["force_num_active_loras"] = len(self.input_batch.lora_id_to_lora_request) + 1
        return original(self, num_tokens, num_reqs, *args, **kw)

    return _determine_batch_execution_and_padding


def wrap_get_slot_mappings(original: Original) -> Original:
    """``_get_slot_mappings``: covers decoder rows. vLLM fills what is behind the scheduled rows with -1."""

    @wraps(original)
    def _get_slot_mappings(
        self: Any, num_tokens_padded: int, num_reqs_padded: int, num_tokens_unpadded: int, *args: Any, **kw: Any
    ) -> Any:
        if rows := _rows(self):
            num_tokens_padded = max(num_tokens_padded, num_tokens_unpadded + len(rows))
            num_reqs_padded = max(num_reqs_padded, self.input_batch.num_reqs + len(rows.requests))
        return original(self, num_tokens_padded, num_reqs_padded, num_tokens_unpadded, *args, **kw)

    return _get_slot_mappings


def wrap_build_attention_metadata(original: Original) -> Original:
    """``_build_attention_metadata``: shows decoder requests to attention."""

    @wraps(original)
    def _build_attention_metadata(self: Any, num_tokens: int, num_reqs: int, *args: Any, **kwargs: Any) -> Any:
        if rows := _rows(self):
            num_tokens, num_reqs = num_tokens + len(rows), num_reqs + len(rows.requests)
        with attended_step.step(rows):
            return original(self, num_tokens, num_reqs, *args, **kwargs)

    return _build_attention_metadata


def wrap_prepare_padding_mask(original: Original) -> Original:
    """``_prepare_padding_mask``: decoder rows are not padding."""

    @wraps(original)
    def _prepare_padding_mask(self: Any, num_tokens_unpadded: int, num_tokens_padded: int) -> Any:
        rows = _rows(self)
        return original(self, num_tokens_unpadded + (len(rows) if rows else 0), num_tokens_padded)

    return _prepare_padding_mask
