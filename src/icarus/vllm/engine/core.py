"""Cache keys, marking and refusals: what the plugin wraps outside of the workers.

Each function below takes a function of vLLM and gives the one that stands in for it; ledger.py says which, why, and
what their upstream text is.
"""

from __future__ import annotations

import time
from functools import cache, partial, wraps
from inspect import signature
from pathlib import Path
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.lora.utils import get_adapter_absolute_path

from icarus import hub
from icarus.errors import AdapterError, InputError
from icarus.vllm.engine import limits
from icarus.vllm.engine.counting import count_load
from icarus.vllm.engine.marking import marked, to_load
from icarus.vllm.engine.policy import Policy
from icarus.vllm.marks import SharedLoRARequest
from icarus.vllm.patching import Original
from icarus.vllm.state import Attached
from icarus.vllm.worker.adapters import stage, unstage

logger = init_logger("vllm.icarus")  # below vLLM's own logger, so that it prints like one

POLICY = Attached[Policy]("policy")
"""On an engine core, or the input processor of a front end."""

_SCORED = Attached[tuple[int, int]]("scored")
"""On a scheduler: a step, and how many rows of scored prompts it has."""


def policy_of(owner: Any) -> Policy:
    """The policy of an engine core or a front end, made when it is first asked for.

    The scheduler of an engine core knows the kinds of cache that the model keeps; a front end leaves that to the core.
    """
    return POLICY.get_or_make(owner, partial(_policy, owner))


def _policy(owner: Any) -> Policy:
    config = owner.vllm_config
    layout = getattr(getattr(owner, "scheduler", None), "kv_cache_config", None)
    groups = layout.kv_cache_groups if layout else ()
    why = (
        limits.refusal(config)
        or limits.room_refusal(config.scheduler_config)
        or limits.cache_refusal(group.kv_cache_spec for group in groups)
    )
    return Policy(cache(partial(_base_folder, config)), why, get_adapter_absolute_path)


def _base_folder(config: Any) -> Path:
    """The folder of weights that the engine has loaded."""
    model = config.model_config.model
    if Path(model).is_dir():
        return Path(model)
    try:
        return hub.snapshot(
            model,
            ["*.json", "*.safetensors"],
            revision=config.model_config.revision,
            cache=config.load_config.download_dir,
            cached=True,  # what the engine has loaded, and no newer revision
        )
    except hub.DownloadError as error:
        raise InputError(
            f"The weights of {model} are not in a local folder or the hub's cache, so adapters cannot be "
            "checked against them: serve the base model from a local folder."
        ) from error


def wrap_post_init(original: Original) -> Original:
    """``VllmConfig.__post_init__``: room for decoder rows, before anything is sized."""

    @wraps(original)
    def __post_init__(self: Any) -> None:  # noqa: N807  # its name in vLLM
        if self.lora_config is not None and self.model_config and not limits.refusal(self):
            drafts = self.speculative_config.num_speculative_tokens if self.speculative_config else 0
            limits.reserve_room(self.scheduler_config, 1 + drafts)
        original(self)

    return __post_init__


def wrap_gen_lora_extra_hash_keys(original: Original) -> Original:
    """``_gen_lora_extra_hash_keys``: nothing of an adapter that shares; of all others what stock says."""

    @wraps(original)
    def _gen_lora_extra_hash_keys(request: Any) -> Any:
        return [] if isinstance(request.lora_request, SharedLoRARequest) else original(request)

    return _gen_lora_extra_hash_keys


def wrap_preprocess_add_request(original: Original) -> Original:
    """``EngineCore.preprocess_add_request``: every request enters the core here, and before its blocks are hashed."""

    @wraps(original)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        if request.lora_request is not None:
            request.lora_request = marked(policy_of(self), request.lora_request)
        return original(self, request)

    return preprocess_add_request


def wrap_add_lora(original: Original) -> Original:
    """``EngineCore.add_lora``: verified before a worker reads it."""

    @wraps(original)
    def add_lora(self: Any, lora_request: Any) -> Any:
        started, policy, name = time.perf_counter(), policy_of(self), lora_request.lora_int_id
        request, verdict = to_load(policy, lora_request)
        shares = isinstance(request, SharedLoRARequest)
        if shares:
            logger.info("%s is an ICaRus adapter: it shares the base model's KV cache.", lora_request.lora_name)
            _stage(self.model_executor, request)
        done = original(self, request)
        policy.restore(name, verdict)
        count_load(self, lora_request, time.perf_counter() - started, shares=shares)
        return done

    return add_lora


def _stage(executor: Any, request: SharedLoRARequest) -> None:
    """All workers of this engine have a copy afterwards, or none has and AdapterError is raised."""
    if refused := [said for said in executor.collective_rpc(stage, args=(request,)) if said]:
        executor.collective_rpc(unstage, args=(request.lora_int_id,))
        raise AdapterError(refused[0])


def wrap_remove_lora(original: Original) -> Original:
    """``EngineCore.remove_lora``: what comes under the same id later is another adapter."""

    @wraps(original)
    def remove_lora(self: Any, lora_id: int) -> Any:
        policy_of(self).restore(lora_id, None)
        return original(self, lora_id)

    return remove_lora


def wrap_reserve_prefill_lookahead(original: Original) -> Original:
    """``Scheduler._reserve_prefill_lookahead``: a prompt that is scored is prefilled in pieces that there is room for.

    vLLM asks it for the length of every chunk before it takes it from the step's budget.
    """

    @wraps(original)
    def _reserve_prefill_lookahead(self: Any, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        count: int = original(self, request, num_computed_tokens, num_new_tokens)
        params, shares = request.sampling_params, isinstance(request.lora_request, SharedLoRARequest)
        if not shares or params is None or params.prompt_logprobs is None:
            return count
        if num_computed_tokens >= request.num_prompt_tokens:  # it decodes, for which there is room besides
            return count
        step, used = _SCORED.get(self) or (None, 0)
        used = used if step == self.current_step else 0
        count = min(count, limits.MAX_SCORED_ROWS - used)
        _SCORED.set(self, (self.current_step, used + count))
        return count

    return _reserve_prefill_lookahead


def wrap_process_inputs(original: Original) -> Original:
    """``InputProcessor.process_inputs``: an adapter that is refused is the client's error (400), and no engine's."""
    position = list(signature(original).parameters).index("lora_request")

    @wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = kwargs.get("lora_request", args[position - 1] if len(args) >= position else None)
        if request is not None and self.lora_config:
            try:
                policy_of(self).decide(request.lora_int_id, request.lora_path)
            except InputError as error:
                raise VLLMValidationError(str(error), parameter="model") from error
        return original(self, *args, **kwargs)

    return process_inputs
