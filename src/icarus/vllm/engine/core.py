"""What changes in the engine core: room for decoder rows, cache keys, marks, loading, and prefill of scored prompts.

Each ``wrap_`` function takes a function of vLLM and returns its replacement; see ledger.py.
"""

from __future__ import annotations

import time
from functools import wraps
from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform

from icarus.errors import AdapterError
from icarus.vllm.engine import limits
from icarus.vllm.engine.attached_policy import policy_of
from icarus.vllm.engine.counting import count_load
from icarus.vllm.engine.marking import marked, to_load
from icarus.vllm.marks import SharedLoRARequest, VerifiedLoRARequest
from icarus.vllm.patching import Original
from icarus.vllm.state import Attached
from icarus.vllm.worker.adapters import REFUSED, stage, unstage

logger = init_logger("vllm.icarus")  # below vLLM's own logger, so that it prints like one

_SCORED_ROWS = Attached[tuple[int, int]]("scored_rows")
"""On a scheduler: the number of a step, and how many rows of scored prompts that step has so far."""


def wrap_post_init(original: Original) -> Original:
    """``VllmConfig.__post_init__``: makes room for decoder rows before any buffer is sized."""

    @wraps(original)
    def __post_init__(self: Any) -> None:  # noqa: N807  # its name in vLLM
        if self.lora_config is not None and self.model_config and not limits.refusal(self):
            drafts = self.speculative_config.num_speculative_tokens if self.speculative_config else 0
            limits.reserve_room(self.scheduler_config, 1 + drafts)
            if current_platform.is_cuda() and not drafts:
                ceiling = 1024 if current_platform.is_device_capability_family(100) else 512
                limits.cover_graphs(self.compilation_config, self.scheduler_config.max_num_active_seqs, ceiling)
        original(self)

    return __post_init__


def wrap_gen_lora_extra_hash_keys(original: Original) -> Original:
    """``_gen_lora_extra_hash_keys``: an adapter that shares adds nothing to the cache key; others do, as in vLLM."""

    @wraps(original)
    def _gen_lora_extra_hash_keys(request: Any) -> Any:
        lora = request.lora_request
        if isinstance(lora, SharedLoRARequest):
            return []
        keys = original(request)
        return [*keys, f"{lora.sha256}/{lora.epoch}"] if isinstance(lora, VerifiedLoRARequest) else keys

    return _gen_lora_extra_hash_keys


def wrap_preprocess_add_request(original: Original) -> Original:
    """``EngineCore.preprocess_add_request``: marks requests. Each one enters the core here, before it is hashed."""

    @wraps(original)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        if request.lora_request is not None:
            request.lora_request = marked(policy_of(self), request.lora_request)
        return original(self, request)

    return preprocess_add_request


def wrap_add_lora(original: Original) -> Original:
    """``EngineCore.add_lora``: verifies an adapter before a worker reads it."""

    @wraps(original)
    def add_lora(self: Any, lora_request: Any) -> Any:
        started, policy, adapter_id = time.perf_counter(), policy_of(self), lora_request.lora_int_id
        try:
            request, verdict = to_load(policy, lora_request)
        except AdapterError as error:  # said to the front end in the form in which a worker says it
            raise AdapterError(REFUSED + str(error)) from error
        shares = isinstance(request, SharedLoRARequest)
        if shares:
            logger.info("%s is an ICaRus adapter: it shares the base model's KV cache.", lora_request.lora_name)
        _stage(self.model_executor, request)
        loaded = original(self, request)
        policy.note(adapter_id, verdict)
        count_load(self, lora_request, time.perf_counter() - started, shares=shares)
        return loaded

    return add_lora


def _stage(executor: Any, request: VerifiedLoRARequest) -> None:
    """Have all workers of this engine copy and read an adapter; if one cannot, none keeps its copy.

    Raises:
        AdapterError: a worker could not copy it, or vLLM cannot serve it.
    """
    if refusals := [refusal for refusal in executor.collective_rpc(stage, args=(request,)) if refusal]:
        executor.collective_rpc(unstage, args=(request.lora_int_id,))
        raise AdapterError(refusals[0])


def wrap_remove_lora(original: Original) -> Original:
    """``EngineCore.remove_lora``: forgets the verdict, since another adapter may come under the same id."""

    @wraps(original)
    def remove_lora(self: Any, lora_id: int) -> Any:
        policy_of(self).note(lora_id, None)
        return original(self, lora_id)

    return remove_lora


def wrap_reserve_prefill_lookahead(original: Original) -> Original:
    """``Scheduler._reserve_prefill_lookahead``: cuts the prefill of a scored prompt into chunks that there is room for.

    vLLM calls it for the length of every chunk, before it takes the chunk from the step's budget.
    """

    @wraps(original)
    def _reserve_prefill_lookahead(self: Any, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        count: int = original(self, request, num_computed_tokens, num_new_tokens)
        params, shares = request.sampling_params, isinstance(request.lora_request, SharedLoRARequest)
        if not shares or params is None:
            return count
        if params.prompt_logprobs is None and params.prompt_logprob_token_ids is None:
            return count
        if num_computed_tokens >= request.num_prompt_tokens:  # it decodes, and there is other room for that
            return count
        step, used = _SCORED_ROWS.get(self) or (None, 0)
        used = used if step == self.current_step else 0
        count = min(count, limits.MAX_SCORED_ROWS - used)
        _SCORED_ROWS.set(self, (self.current_step, used + count))
        return count

    return _reserve_prefill_lookahead
