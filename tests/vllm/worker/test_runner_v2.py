"""One step through the methods of model runner V2 that are extended, on plain objects: vLLM's batch, no engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from strict_skips import WITHOUT_VLLM

pytest.importorskip("vllm.config", reason=WITHOUT_VLLM)

from vllm.lora.request import LoRARequest
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

from icarus.vllm.marks import SharedLoRARequest
from icarus.vllm.worker import runner_v2
from icarus.vllm.worker.runner_v2 import DecoderRowsRunner

TOKENS, REQUESTS = 24, 5
CPU = torch.device("cpu")
# In vLLM's order, each with another state: base, two that share, and between them conventional and a long prompt in
# pieces. With decoder requests: b c c' d' e a d, and their rows b c c' d' ee aaa dddd.
NAMES = "bcead"
SCHEDULED = np.array([1, 1, 2, 3, 4], dtype=np.int32)
STATES = np.array([0, 2, 3, 4, 1])
ADAPTERS = {"a": 1, "c": 2, "d": 1, "e": 3}
CACHED = np.array([9, 7, 3, 5, 0], dtype=np.int32)
PREFILL = np.array([9, 7, 5, 20, 4], dtype=np.int32)
COUNT, TOTAL = len(SCHEDULED), int(SCHEDULED.sum())


def by_state(values: Any) -> Any:
    placed = np.zeros(REQUESTS, dtype=np.asarray(values).dtype)
    placed[STATES] = values
    return placed


def vllm_config() -> Any:
    return SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=2 * REQUESTS, max_num_active_seqs=REQUESTS))


class Vllms:
    """The parts of vLLM's runner that are extended, as far as these look at them."""

    def __init__(self, config: Any, device: Any) -> None:
        self.vllm_config, self.scheduler_config = config, config.scheduler_config
        self.max_num_reqs, self.max_num_tokens = self.scheduler_config.max_num_seqs, TOKENS
        self.device, self.lora_config, self.uses_inputs_embeds = device, "on", False
        self.decode_query_len = 1
        self.supports_mm_inputs, self.aux_output_connector = False, None
        self.input_buffers = InputBuffers(self.max_num_reqs, TOKENS, device)
        self.cudagraph_manager = SimpleNamespace()
        self.model_state = SimpleNamespace(num_new_sampled_tokens_per_step=1)
        self.req_states = SimpleNamespace(
            num_computed_tokens_np=by_state(CACHED), prompt_len=SimpleNamespace(np=by_state(PREFILL))
        )
        self.prompt_logprobs_worker: Any = SimpleNamespace(
            uses_prompt_logprobs=np.zeros(REQUESTS, dtype=bool), token_id_scores={}
        )
        kinds = {"e": LoRARequest}
        self.lora_state = SimpleNamespace(
            lora_ids=by_state([ADAPTERS.get(name, 0) for name in NAMES]),
            lora_requests={
                name: kinds.get(name, SharedLoRARequest)(lora_name=str(number), lora_int_id=number, lora_path="/no")
                for name, number in ADAPTERS.items()
            },
        )
        self.mapped: list[Any] = []
        self.block_tables = SimpleNamespace(
            slot_mappings=torch.full((2, TOKENS), 50, dtype=torch.int64), block_sizes=[4, 4]
        )
        self.execute_model_state: Any = None

    def initialize_kv_cache(self, config: Any) -> int:
        return self.max_num_reqs

    def prepare_dummy_attn(self, batch: Any) -> Any:
        return batch

    def gather_batch_req_state(self, output: Any, dummy_run: bool) -> Any:
        state = SimpleNamespace(
            req_ids=list(NAMES), num_scheduled_tokens=SCHEDULED, idx_mapping_np=STATES, prefill_len_np=PREFILL,
            num_draft_tokens_np=None,
        )  # fmt: skip
        return (None if dummy_run else state), 7

    def prepare_inputs(self, *given: Any) -> InputBatch:
        assert self.max_num_reqs == 2 * REQUESTS, "it sizes query_start_loc by this"
        starts = np.full(self.max_num_reqs + 1, TOTAL, dtype=np.int32)
        starts[: COUNT + 1] = [0, *np.cumsum(SCHEDULED)]
        buffers = self.input_buffers
        buffers.query_start_loc.copy_(torch.from_numpy(starts))
        buffers.input_ids[:] = torch.arange(100, 100 + TOKENS)
        buffers.positions[:TOTAL] = torch.tensor(
            [c + i for c, n in zip(CACHED, SCHEDULED, strict=True) for i in range(n)]
        )
        buffers.positions[TOTAL:] = -7
        buffers.seq_lens[:COUNT] = torch.from_numpy(CACHED + SCHEDULED)
        is_prefilling = np.array([False, False, True, True, True])
        return InputBatch(
            req_ids=list(NAMES), num_reqs=COUNT, num_reqs_after_padding=COUNT, idx_mapping=torch.from_numpy(STATES),
            idx_mapping_np=STATES, expanded_idx_mapping=torch.from_numpy(STATES), expanded_local_pos=torch.zeros(COUNT),
            num_scheduled_tokens=SCHEDULED, num_tokens=TOTAL, num_tokens_after_padding=TOTAL, num_draft_tokens=0,
            num_draft_tokens_per_req=None, query_start_loc=buffers.query_start_loc[: COUNT + 1],
            query_start_loc_np=starts[: COUNT + 1], seq_lens=buffers.seq_lens[:COUNT],
            seq_lens_cpu_upper_bound=torch.from_numpy(CACHED + SCHEDULED), dcp_local_seq_lens=None,
            num_computed_tokens_np=CACHED, prefill_len_np=PREFILL, num_computed_prefill_tokens_np=CACHED,
            is_prefilling_np=is_prefilling, has_prefill=True, decode_graph_eligible=False,
            input_ids=buffers.input_ids[:TOTAL], positions=buffers.positions[:TOTAL],
            is_padding=buffers.is_padding[:TOTAL], logits_indices=torch.from_numpy(np.cumsum(SCHEDULED) - 1),
            cu_num_logits=torch.arange(COUNT + 1), cu_num_logits_np=np.arange(COUNT + 1),
            has_structured_output_reqs=False, prompt_lens=None,
        )  # fmt: skip

    def prepare_attn(self, batch: Any) -> Any:
        return batch.idx_mapping, self.block_tables.slot_mappings[:, : batch.num_tokens_after_padding]

    def _set_active_loras(self, *mapping: Any) -> None:
        self.mapped.append(mapping)

    def execute_model(self, output: Any, *args: Any, **kwargs: Any) -> Any:
        """What vLLM's does in this order, with hidden states that name their rows."""
        self.gather_batch_req_state(output, False)
        sizes = lambda manager, *given, **named: (given, named)  # noqa: E731
        dispatch = runner_v2.wrap_dispatch_cg_and_sync_dp(sizes)
        names = {request.lora_name for request in self.lora_state.lora_requests.values()}
        self.dispatched = dispatch(self.cudagraph_manager, COUNT, TOTAL, num_active_loras=len(names))
        self.batch = batch = self.prepare_inputs()
        self.attended, self.written = self.prepare_attn(batch)
        per_row = np.repeat(self.lora_state.lora_ids[batch.idx_mapping_np], batch.num_scheduled_tokens)
        self._set_active_loras(tuple(self.lora_state.lora_ids[batch.idx_mapping_np]), tuple(per_row), set())
        hidden = torch.arange(float(batch.num_tokens))[:, None].expand(-1, 2).clone()
        self.execute_model_state = State(batch, hidden)


class State(SimpleNamespace):
    def __init__(self, input_batch: Any, hidden_states: Any) -> None:
        super().__init__(input_batch=input_batch, hidden_states=hidden_states)

    def _replace(self, input_batch: Any) -> State:
        return State(input_batch, self.hidden_states)


class Runner(DecoderRowsRunner, Vllms):
    pass


@pytest.fixture
def runner() -> Any:
    return Runner(vllm_config(), CPU)


OUTPUT = SimpleNamespace(scheduled_new_reqs=[])


def test_a_step(runner: Any) -> None:
    runner.execute_model(OUTPUT)
    # The sources of decoder rows 2 and 3 are rows 1 (request c) and 10 (the last of request d).
    batch, sampled = runner.batch, runner.execute_model_state.input_batch
    assert sampled.logits_indices.tolist() == [0, 2, 5, 8, 3]
    assert (sampled.num_reqs, sampled.num_tokens, sampled.req_ids) == (5, 11, list(NAMES))
    assert sampled.query_start_loc.tolist() == [0, 1, 2, 4, 7, 11]
    assert sampled.seq_lens.tolist() == [10, 8, 5, 8, 4]
    assert sampled.positions[sampled.logits_indices].tolist() == [9, 7, 4, 7, 3]
    assert sampled.input_ids[sampled.logits_indices].tolist() == [100, 101, 103, 106, 110]
    assert runner.dispatched == ((7, 13), {"num_active_loras": 4})  # none, and those of c, d and e
    assert batch.req_ids == list("bccdead")
    assert (batch.num_reqs, batch.num_reqs_after_padding) == (7, 7)
    assert (batch.num_tokens, batch.num_tokens_after_padding) == (13, 13)
    assert batch.idx_mapping.tolist() == batch.idx_mapping_np.tolist() == [0, 2, 2, 1, 3, 4, 1]
    assert batch.query_start_loc.tolist() == batch.query_start_loc_np.tolist() == [0, 1, 2, 3, 4, 6, 9, 13]
    assert runner.input_buffers.query_start_loc.tolist() == [0, 1, 2, 3, 4, 6, 9, 13, 13, 13, 13]
    assert batch.num_scheduled_tokens.tolist() == [1, 1, 1, 1, 2, 3, 4]
    assert batch.seq_lens.tolist() == batch.seq_lens_cpu_upper_bound.tolist() == [10, 8, 8, 4, 5, 8, 4]
    assert batch.num_computed_tokens_np.tolist() == [9, 7, 7, 3, 3, 5, 0]
    assert batch.input_ids.tolist() == [100, 101, 101, 110, *range(102, 111)]
    assert batch.positions.tolist() == [9, 7, 7, 3, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert batch.is_prefilling_np.tolist() == [False, False, False, True, True, True, True]
    [(per_sample, per_row, active)] = runner.mapped
    assert per_sample == (0, 2, 3, 1, 1)
    assert per_row == (0, 0, 2, 1, 3, 3, 0, 0, 0, 0, 0, 0, 0)
    assert sorted(request.lora_int_id for request in active) == [1, 2, 3]


def test_decoder_requests_read_their_sources_blocks_and_write_nothing(runner: Any) -> None:
    runner.execute_model(OUTPUT)
    assert runner.attended.tolist() == [0, 2, 2, 1, 3, 4, 1]
    assert runner.written.tolist() == 2 * [2 * [50] + 2 * [-1] + 9 * [50]]


def test_attention_kernels_for_decodes_get_all_decoder_rows_of_a_mixed_step(runner: Any) -> None:
    from vllm.v1.attention.backends.utils import split_decodes_and_prefills

    runner.execute_model(OUTPUT)
    starts = torch.from_numpy(runner.batch.query_start_loc_np)
    seen = SimpleNamespace(max_query_len=4, num_reqs=7, num_actual_tokens=13, query_start_loc_cpu=starts)
    assert split_decodes_and_prefills(seen) == (4, 3, 4, 9), "b, c, and the decoder requests of c and d"


def test_with_drafts_decoder_requests_have_the_length_of_decodes(runner: Any) -> None:
    """Behind all that are as short, whatever comes first."""
    assert runner_v2._decodes(np.array([3, 3, 2, 3, 1, 2, 9, 30]), 3) == 6
    assert runner_v2._decodes(np.array([3, 3]), 3) == 2
    assert runner_v2._decodes(np.array([30, 40]), 1) == 0


def test_steps_that_are_laid_out_alike_share_plan_and_indices(runner: Any) -> None:
    plans: list[Any] = []
    prepare = runner.prepare_inputs
    runner.prepare_inputs = lambda *given: plans.append(runner._decoder_plan.layout) or prepare(*given)
    runner.execute_model(OUTPUT)
    runner.req_states.num_computed_tokens_np[STATES[:2]] += 1
    runner.execute_model(OUTPUT)
    assert plans[0] is plans[1]
    assert runner.mapped[0][1] is runner.mapped[1][1]
    assert runner.batch.query_start_loc_np is not plans[0].starts, "vLLM may write to what it is given"
    runner.lora_state.lora_ids[STATES[1]] = 1  # request c is of another adapter
    runner.execute_model(OUTPUT)
    assert plans[2] is not plans[1]
    assert runner.mapped[2][1] == (0, 0, 1, 1, 3, 3, 0, 0, 0, 0, 0, 0, 0)


def test_adapters_are_counted_by_id(runner: Any) -> None:
    """One that was loaded again while a request runs has two ids and one name, and vLLM counts names."""
    runner.lora_state.lora_requests["c"].lora_name = "1"
    runner.execute_model(OUTPUT)
    assert runner.dispatched[1] == {"num_active_loras": 4}


def test_a_plan_ends_with_its_step(runner: Any) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("in the middle")

    runner._set_active_loras = fails
    with pytest.raises(RuntimeError, match="in the middle"):
        runner.execute_model(OUTPUT)
    sizes = lambda manager, *given, **named: given  # noqa: E731
    assert runner_v2.wrap_dispatch_cg_and_sync_dp(sizes)(runner.cudagraph_manager, 5, 11) == (5, 11)
    assert runner.prepare_inputs().num_reqs == COUNT


def test_without_requests_that_share_all_is_stock(runner: Any) -> None:
    runner.lora_state.lora_requests = {
        name: LoRARequest(lora_name=str(number), lora_int_id=number, lora_path="/no")
        for name, number in ADAPTERS.items()
    }
    runner.execute_model(OUTPUT)
    assert runner.execute_model_state.input_batch is runner.batch
    assert runner.dispatched == ((5, 11), {"num_active_loras": 3})
    assert (runner.written == 50).all()
    [(_, per_row, _)] = runner.mapped
    assert per_row == (0, 2, 3, 3, 1, 1, 1, 1, 1, 1, 1)


def test_a_prompt_in_pieces_runs_on_base_weights(runner: Any) -> None:
    """No decoder row, but rows that must not run on the adapter."""
    for name in "cde":
        del runner.lora_state.lora_requests[name]
    runner.lora_state.lora_ids[:] = by_state([0, 0, 0, 1, 0])
    runner.execute_model(OUTPUT)
    assert runner.batch.num_reqs == COUNT
    [(per_sample, per_row, _)] = runner.mapped
    assert per_sample == (0, 0, 0, 1, 0)
    assert per_row == (0,) * 11


@pytest.mark.parametrize("by", ["prompt_logprobs", "prompt_logprob_token_ids"])
def test_a_scored_prompt_has_a_decoder_row_for_each_of_its_rows(runner: Any, by: str) -> None:
    worker = runner.prompt_logprobs_worker
    if by == "prompt_logprobs":
        worker.uses_prompt_logprobs[[4, 0]] = True  # the states of a and b
    else:
        worker.token_id_scores = {"a": None, "b": None}
    runner.execute_model(OUTPUT)
    assert runner.mapped[0][1] == (0, 0, 3, 3, 0, 0, 0, 0, 0, 0, 0, 2, 1, 1, 1, 1), "vLLM counts scheduled rows"
    state = runner.execute_model_state
    assert state.input_batch.logits_indices.tolist() == [0, 11, 3, 14, 15], "b is the base model's"
    assert state.hidden_states[:11, 0].tolist() == [0, 11, 2, 3, 12, 13, 14, 7, 8, 9, 15]


def test_rows_stay_where_they_are_beside_the_scored_prompt_of_another_model(runner: Any) -> None:
    runner.prompt_logprobs_worker.uses_prompt_logprobs[3] = True
    runner.execute_model(OUTPUT)
    assert runner.batch.req_ids == list("bceadcd")
    assert runner.execute_model_state.input_batch.logits_indices.tolist() == [0, 11, 3, 6, 12]
    assert runner.written.tolist() == 2 * [11 * [50] + 2 * [-1]]


@pytest.mark.parametrize(("name", "value"), [("supports_mm_inputs", True), ("aux_output_connector", object())])
def test_rows_stay_where_they_are_where_something_counts_them(runner: Any, name: str, value: Any) -> None:
    """Qwen3-VL keeps DeepStack features by row, from embedding to forward pass; a report of experts counts rows."""
    setattr(runner, name, value)
    runner.execute_model(OUTPUT)
    assert runner.batch.req_ids == list("bceadcd")


def test_rows_without_room_are_an_error_and_not_a_write_beyond_the_end(runner: Any) -> None:
    runner._request_room = 6
    with pytest.raises(RuntimeError, match="--max-num-seqs"):
        runner.execute_model(OUTPUT)


def test_states_are_kept_for_scheduled_requests_and_buffers_for_decoder_requests_too(runner: Any) -> None:
    assert runner.max_num_reqs == runner.scheduler_config.max_num_seqs == REQUESTS
    assert runner.vllm_config.scheduler_config.max_num_seqs == 2 * REQUESTS, "what builders of metadata read"
    assert len(runner.input_buffers.seq_lens) == 2 * REQUESTS
    assert runner.initialize_kv_cache("config") == 2 * REQUESTS
    assert runner.max_num_reqs == REQUESTS
    dummy = SimpleNamespace(idx_mapping=torch.arange(2 * REQUESTS))
    assert runner.prepare_dummy_attn(dummy).idx_mapping.max() == REQUESTS - 1


def test_a_batch_of_decodes_stays_uniform(runner: Any) -> None:
    assert runner.gather_batch_req_state(OUTPUT, False)[1] is None, "d samples one of four rows"
    runner.req_states.num_computed_tokens_np[STATES[4]] = -9  # now it is in the middle of its prompt
    assert runner.gather_batch_req_state(OUTPUT, False)[1] == 7
    assert runner.gather_batch_req_state(OUTPUT, True) == (None, 7)


def test_with_several_positions_for_each_row(runner: Any) -> None:
    """M-RoPE: vLLM computes them from a request's first row, which a decoder request does not have."""
    runner.execute_model(OUTPUT)
    positions = torch.arange(3 * 16).view(3, 16)
    seen: list[Any] = []

    def original(self: Any, batch: Any, states: Any) -> Any:
        seen.append((batch.num_reqs, batch.num_tokens_after_padding))
        return {"positions": positions[:, : batch.num_tokens_after_padding]}

    prepare = runner_v2.wrap_prepare_inputs(original)
    inputs = prepare(SimpleNamespace(rope_state="M-RoPE"), runner.batch, None)
    assert seen == [(5, 13)]
    assert inputs["positions"][0].tolist() == [0, 1, 1, 10, *range(2, 11)]
    assert inputs["positions"][:, 2:4].T.tolist() == [[1, 17, 33], [10, 26, 42]]
    prepare(SimpleNamespace(rope_state=None), runner.batch, None)
    assert seen[-1] == (7, 13), "there is nothing to do"


def test_embeddings(runner: Any) -> None:
    runner.execute_model(OUTPUT)

    def original(self: Any, inputs: Any, batch: Any, states: Any) -> Any:
        assert batch.req_ids == list(NAMES), "images are gathered by request"
        assert batch.input_ids[: batch.num_tokens].tolist() == list(range(100, 111)), "as they were"
        return torch.arange(float(batch.num_tokens_after_padding))[:, None]

    embeddings = runner_v2.wrap_prepare_inputs_embeds(original)(SimpleNamespace(), {}, runner.batch, None)
    assert embeddings[:, 0].tolist() == [0, 1, 1, 10, *range(2, 11)]


@pytest.mark.parametrize("worker", ["gpu", "cpu"])
def test_workers_make_the_extended_runner(worker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU worker by ``_make_model_runner``, which no CPU worker calls; a CPU worker by the name it imports."""
    from importlib import import_module

    module, name = ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner")
    wrap = runner_v2.wrap_gpu_model_runner
    if worker == "cpu":
        module, name, wrap = ("vllm.v1.worker.cpu.model_runner", "CPUModelRunner", runner_v2.wrap_cpu_model_runner)
    monkeypatch.setattr(import_module(module), name, wrap(Vllms))
    made = getattr(import_module(module), name)
    if worker == "gpu":
        from vllm.v1.worker.gpu_worker import Worker

        config = vllm_config()
        config.is_mm_encoder_only = False
        plain = SimpleNamespace(use_v2_model_runner=True, vllm_config=config, device=CPU)
        assert isinstance(Worker._make_model_runner(plain), DecoderRowsRunner)
    assert issubclass(made, DecoderRowsRunner)
    assert issubclass(made, Vllms)
    assert wrap(made) is made
