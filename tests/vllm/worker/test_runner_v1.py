"""One step through the wrapped methods of the runner, with buffers of vLLM's and no engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from strict_skips import WITHOUT_VLLM

pytest.importorskip("vllm.config", reason=WITHOUT_VLLM)

from vllm.lora.request import LoRARequest
from vllm.v1.utils import CpuGpuBuffer

from icarus.vllm.marks import SharedLoRARequest
from icarus.vllm.worker import runner_v1 as runner

TOKENS, REQUESTS, BLOCKS = 24, 10, 4
CPU = torch.device("cpu")
# Scheduled rows of each request; ids as in LORAS: a long prompt in pieces, base, two that share, conventional.
SCHEDULED = np.array([3, 1, 1, 4, 2], dtype=np.int32)
IDS = np.array([1, 0, 2, 1, 3])
MIDWAY = [True, False, False, False, False]
CACHED = [5, 9, 7, 0, 3]


def buffer(*size: int, dtype: torch.dtype = torch.int32) -> CpuGpuBuffer:
    values = CpuGpuBuffer(*size, dtype=dtype, device=CPU, pin_memory=False)
    values.gpu = values.cpu  # as vLLM's CPU runner does
    return values


def loras(**kinds: type) -> dict[int, Any]:
    return {
        number: kinds.get(name, SharedLoRARequest)(lora_name=name, lora_int_id=number, lora_path="/nowhere")
        for number, name in ((1, "one"), (2, "two"), (3, "plain"))
    }


@pytest.fixture
def step() -> Any:
    """A runner in the middle of a step: everything stock has been written, stale values behind it."""
    count, total = len(SCHEDULED), int(SCHEDULED.sum())
    step = SimpleNamespace(
        device=CPU, max_num_tokens=TOKENS, max_num_reqs=REQUESTS, uses_mrope=False, supports_mm_inputs=False,
        enable_prompt_embeds=False, num_prompt_logprobs={}, mapped=[],
        query_start_loc=buffer(REQUESTS + 1), discard_request_mask=buffer(REQUESTS, dtype=torch.bool),
        input_ids=buffer(TOKENS), positions=torch.full((TOKENS,), -7), seq_lens=torch.full((REQUESTS,), -7),
        optimistic_seq_lens_cpu=torch.full((REQUESTS,), -7),
    )  # fmt: skip
    step.query_start_loc.np[:] = total
    step.query_start_loc.np[: count + 1] = [0, *np.cumsum(SCHEDULED)]
    step.discard_request_mask.np[:count] = MIDWAY
    step.input_ids.np[:] = np.arange(100, 100 + TOKENS)
    positions = [c + i for c, n in zip(CACHED, SCHEDULED, strict=True) for i in range(n)]
    step.positions[:total] = torch.tensor(positions)
    step.seq_lens[:count] = step.optimistic_seq_lens_cpu[:count] = torch.tensor(CACHED) + torch.from_numpy(SCHEDULED)
    table = SimpleNamespace(block_table=buffer(REQUESTS, BLOCKS), num_blocks_per_row=np.array([2, 1, 3, 1, 1, 9, 9]))
    table.block_table.np[:] = np.arange(REQUESTS * BLOCKS).reshape(REQUESTS, BLOCKS)
    step.input_batch = SimpleNamespace(
        num_reqs=count, req_ids=list("abcde"), request_lora_mapping=IDS,
        block_table=SimpleNamespace(block_tables=[table]),
        lora_id_to_lora_request=loras(plain=LoRARequest),
        num_computed_tokens_cpu_tensor=torch.arange(REQUESTS), num_prompt_tokens_cpu_tensor=torch.arange(REQUESTS) + 50,
    )  # fmt: skip
    step._set_active_loras = lambda *mapping: step.mapped.append(mapping)
    return step


def prepare(step: Any) -> torch.Tensor:
    """What vLLM does between scheduling and the forward pass, as far as it is wrapped; gives the rows to sample."""

    def original(self: Any, output: Any, scheduled: Any) -> Any:
        runner.wrap_set_active_loras(never)(self, self.input_batch, scheduled, np.ones_like(scheduled))
        return torch.from_numpy(np.cumsum(SCHEDULED) - 1), None, 1

    output = SimpleNamespace(total_num_scheduled_tokens=int(SCHEDULED.sum()))
    rows, _, _ = runner.wrap_prepare_inputs(original)(step, output, SCHEDULED)
    runner.wrap_preprocess(lambda *a: "views")(step, output, TOKENS)
    return rows


def never(*_: Any) -> None:
    raise AssertionError("stock vLLM maps steps without requests that share only")


def test_a_step(step: Any) -> None:
    sampled = prepare(step)
    # The sources of decoder rows 11 and 12 are rows 4 (request c) and 8 (the last of request d).
    assert sampled.tolist() == [2, 3, 11, 12, 10]
    [(per_sample, per_row, active)] = step.mapped
    assert per_sample == (1, 0, 2, 1, 3)
    assert per_row == (0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 3, 2, 1)
    assert len(active) == 3
    assert step.query_start_loc.np.tolist() == [0, 3, 4, 5, 9, 11, 12, 13, 13, 13, 13]
    assert step.seq_lens[5:8].tolist() == [8, 4, -7]
    assert step.optimistic_seq_lens_cpu[5:8].tolist() == [8, 4, -7]
    assert step.input_ids.np[11:13].tolist() == [104, 108]
    assert step.positions[11:13].tolist() == [7, 3]
    batch = step.input_batch
    assert batch.num_computed_tokens_cpu_tensor[5:7].tolist() == [2, 3]
    assert batch.num_prompt_tokens_cpu_tensor[5:7].tolist() == [52, 53]
    table = batch.block_table.block_tables[0].block_table.np
    assert table[5:7, :3].tolist() == [[8, 9, 10], [12, 13, 14]]


def test_sizes_count_decoder_rows(step: Any) -> None:
    prepare(step)
    seen = lambda *given, **named: (given[1:], named)  # noqa: E731
    pad = runner.wrap_determine_batch_execution_and_padding(seen)
    named = {"force_eager": True, "force_num_active_loras": 4}
    assert pad(step, num_tokens=11, num_reqs=5, force_eager=True) == ((13, 7), named)
    assert runner.wrap_build_attention_metadata(seen)(step, num_tokens=11, num_reqs=5, max_query_len=4)[0] == (13, 7)
    assert runner.wrap_prepare_padding_mask(seen)(step, 11, 16) == ((13, 16), {})
    slots = runner.wrap_get_slot_mappings(seen)
    filled = slots(step, num_tokens_padded=11, num_reqs_padded=5, num_tokens_unpadded=11)
    assert filled == ((13, 7, 11), {}), "stock vLLM fills from the third to the first with -1"
    assert slots(step, 16, 8, 11)[0] == (16, 8, 11)


def test_a_plan_ends_with_its_step(step: Any) -> None:
    def fails(self: Any, output: Any) -> None:
        prepare(self)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        runner.wrap_execute_model(fails)(step, None)
    seen = lambda *given, **named: given[1:]  # noqa: E731
    assert runner.wrap_determine_batch_execution_and_padding(seen)(step, 11, 5) == (11, 5)
    assert runner.wrap_prepare_padding_mask(seen)(step, 11, 16) == (11, 16)


def test_without_requests_that_share_all_is_stock(step: Any) -> None:
    step.input_batch.lora_id_to_lora_request = loras(one=LoRARequest, two=LoRARequest, plain=LoRARequest)
    assert runner.wrap_set_active_loras(lambda *given: "stock")(step, step.input_batch, SCHEDULED) == "stock"
    assert runner.wrap_build_attention_metadata(lambda *given: given[1:])(step, 11, 5) == (11, 5)


def test_a_scored_prompt_has_a_decoder_row_for_each_of_its_rows(step: Any) -> None:
    step.num_prompt_logprobs = {"a": 0, "b": 0}
    sampled = prepare(step)
    assert step.mapped[0][1] == (0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 3, 1, 1, 1, 2, 1)
    assert sampled.tolist() == [13, 3, 14, 15, 10], "b is the base model's and scored as stock does"
    hidden = runner.wrap_model_forward(lambda self: torch.arange(16.0))(step)
    assert hidden[:11].tolist() == [11, 12, 13, 3, 14, 5, 6, 7, 15, 9, 10]


def test_rows_without_room_are_an_error_and_not_a_write_beyond_the_end(step: Any) -> None:
    step.max_num_reqs = 6
    with pytest.raises(RuntimeError, match="--max-num-seqs"):
        prepare(step)
