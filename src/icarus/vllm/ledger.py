"""The ledger: everything that the plugin changes in vLLM, and the checks before it does.

vLLM has no hooks for rows that another row's cache serves, so functions of vLLM are wrapped. Each change is one record
that says what, why, where the original stands, and what vLLM would have to offer for it to go. Before anything is
changed the running version and the shape of every original are compared with what the records were written against; a
difference stops the process with one sentence, because a plugin that half applies serves wrong tokens. Applying twice
changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from inspect import ismethod, signature
from typing import Any

from icarus.errors import IcarusError

TESTED = ("0.31.0", "0.32.0")
"""Versions of vLLM that the test suite ran against."""

_SENTINEL = "__icarus_patch__"


class PatchError(IcarusError):
    """vLLM is not what the ledger was written against."""


@dataclass(frozen=True)
class Patch:
    """One change."""

    target: str  # module:name or module:class.name
    parameters: str  # names of the original's parameters, in order
    by: str  # module:function that takes the original and gives what stands in for it
    what: str
    why: str
    upstream: str  # file:line of the original in the newest tested version
    until: str  # when the change can go
    before: str = ""  # its parameters in an older tested version, where they differ


_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner."
_OURS = "icarus.vllm.worker.runner:"
_ROW_HOOK = "the runner asks a hook for rows to append to a step"

LEDGER = (
    Patch(
        target="vllm.config.vllm:VllmConfig.__post_init__",
        parameters="self",
        by="icarus.vllm.engine.core:reserving",
        what="with LoRA on, buffers are sized for decoder rows beside what may be scheduled",
        why="decoder rows come on top of max_num_batched_tokens and max_num_seqs, which size every buffer",
        upstream="vllm/config/vllm.py:1414",
        until="a plugin may change the configuration before it is checked",
    ),
    Patch(
        target="vllm.v1.core.kv_cache_utils:_gen_lora_extra_hash_keys",
        parameters="request",
        by="icarus.vllm.engine.core:keyed",
        what="requests whose adapter shares have no adapter in their cache key",
        why="their K/V is the base model's",
        upstream="vllm/v1/core/kv_cache_utils.py:578",
        until="a LoRARequest can say that it does not change the cache",
    ),
    Patch(
        target="vllm.v1.engine.core:EngineCore.preprocess_add_request",
        parameters="self request",
        by="icarus.vllm.engine.core:marking",
        what="requests whose adapter is verified are marked",
        why="cache key, KV events and workers must follow one decision",
        upstream="vllm/v1/engine/core.py:1089",
        until="a LoRARequest can say that it does not change the cache",
    ),
    Patch(
        target="vllm.v1.engine.core:EngineCore.add_lora",
        parameters="self lora_request",
        by="icarus.vllm.engine.core:loading",
        what="an adapter is verified, or verified again, before workers read it",
        why="the decision is about the files that are loaded",
        upstream="vllm/v1/engine/core.py:1051",
        until="adapters have a check that plugins can add to",
    ),
    Patch(
        target="vllm.v1.engine.core:EngineCore.remove_lora",
        parameters="self lora_id",
        by="icarus.vllm.engine.core:unloading",
        what="what was decided about an adapter ends with it",
        why="another one may come under its id",
        upstream="vllm/v1/engine/core.py:1054",
        until="adapters have a check that plugins can add to",
    ),
    Patch(
        target="vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        parameters="self request_id prompt params supported_tasks arrival_time lora_request tokenization_kwargs "
        "trace_headers priority data_parallel_rank resumable session_id kv_hints",
        by="icarus.vllm.engine.core:validating",
        what="requests for refused adapters end as bad requests",
        why="an error in the engine core is the server's (500) and not the client's (400)",
        upstream="vllm/v1/engine/input_processor.py:373",
        until="adapters have a check that plugins can add to",
    ),
    Patch(
        target="vllm.v1.core.sched.scheduler:Scheduler._reserve_prefill_lookahead",
        parameters="self request num_computed_tokens num_new_tokens",
        by="icarus.vllm.engine.core:cutting",
        what="prompts that are scored are prefilled in pieces",
        why="each of their rows needs a decoder row, and buffers have room for a fixed number",
        upstream="vllm/v1/core/sched/scheduler.py:570",
        until="the scheduler asks a hook how many rows a request takes",
    ),
    Patch(
        target=_RUNNER + "execute_model",
        parameters="self scheduler_output intermediate_tensors",
        by=_OURS + "forgetting",
        what="the plan of a step is dropped at its end",
        why="warm-up and idle steps use the same functions and have no decoder rows",
        upstream="vllm/v1/worker/gpu_model_runner.py:3940",
        until=_ROW_HOOK,
    ),
    Patch(
        target=_RUNNER + "set_active_loras",
        parameters="self input_batch num_scheduled_tokens num_sampled_tokens mapping_type",
        by=_OURS + "mapping_loras",
        what="scheduled rows of requests that share run on base weights, their decoder rows on the adapter",
        why="scheduled rows write the cache, decoder rows predict",
        upstream="vllm/v1/worker/lora_model_runner_mixin.py:83",
        until=_ROW_HOOK,
    ),
    Patch(
        target=_RUNNER + "_prepare_inputs",
        parameters="self scheduler_output num_scheduled_tokens",
        by=_OURS + "preparing",
        what="decoder requests are appended to the step, and sampled positions read decoder rows",
        why="a decoder row is a request of its own for attention",
        upstream="vllm/v1/worker/gpu_model_runner.py:1920",
        until=_ROW_HOOK,
    ),
    Patch(
        target=_RUNNER + "_determine_batch_execution_and_padding",
        parameters="self num_tokens num_reqs num_scheduled_tokens_np max_num_scheduled_tokens use_cascade_attn "
        "allow_microbatching force_eager force_uniform_decode force_has_lora force_num_active_loras num_encoder_reqs",
        by=_OURS + "padding",
        what="CUDA graphs and data-parallel ranks count decoder rows",
        why="a graph is chosen by the number of rows and of adapters",
        upstream="vllm/v1/worker/gpu_model_runner.py:3718",
        until=_ROW_HOOK,
    ),
    Patch(
        target=_RUNNER + "_get_slot_mappings",
        parameters="self num_tokens_padded num_reqs_padded num_tokens_unpadded ubatch_slices",
        by=_OURS + "mapping_slots",
        what="decoder rows have slot -1",
        why="they must not write the cache",
        upstream="vllm/v1/worker/gpu_model_runner.py:3856",
        until=_ROW_HOOK,
    ),
    Patch(
        target=_RUNNER + "_build_attention_metadata",
        parameters="self num_tokens num_reqs max_query_len num_tokens_padded num_reqs_padded ubatch_slices "
        "logits_indices max_num_sampled_tokens use_spec_decode for_cudagraph_capture num_scheduled_tokens "
        "slot_mappings",
        before="self num_tokens num_reqs max_query_len num_tokens_padded num_reqs_padded ubatch_slices "
        "logits_indices max_num_sampled_tokens use_spec_decode for_cudagraph_capture num_scheduled_tokens "
        "cascade_attn_prefix_lens slot_mappings",
        by=_OURS + "building_metadata",
        what="attention sees decoder requests",
        why="they read the cache of the requests that they double",
        upstream="vllm/v1/worker/gpu_model_runner.py:2249",
        until=_ROW_HOOK,
    ),
    Patch(
        target=_RUNNER + "_preprocess",
        parameters="self scheduler_output num_input_tokens intermediate_tensors",
        by=_OURS + "embedding",
        what="decoder rows get token, position and embedding of the rows that they double",
        why="both streams start from the same embedding",
        upstream="vllm/v1/worker/gpu_model_runner.py:3292",
        until=_ROW_HOOK,
    ),
    Patch(
        target=_RUNNER + "_prepare_padding_mask",
        parameters="self num_tokens_unpadded num_tokens_padded",
        by=_OURS + "masking",
        what="decoder rows are no padding",
        why="models that skip padded rows would skip them",
        upstream="vllm/v1/worker/gpu_model_runner.py:3273",
        until=_ROW_HOOK,
    ),
    Patch(
        target=_RUNNER + "_model_forward",
        parameters="self input_ids positions intermediate_tensors inputs_embeds model_kwargs",
        by=_OURS + "scoring",
        what="where prompts are scored, decoder rows take the place of the rows that they double",
        why="prompt logprobs are the specialist's and are read from scheduled rows",
        upstream="vllm/v1/worker/gpu_model_runner.py:3620",
        until=_ROW_HOOK,
    ),
    Patch(
        target="vllm.lora.worker_manager:WorkerLoRAManager._load_adapter",
        parameters="self lora_request",
        by="icarus.vllm.worker.adapters:reading",
        what="a worker reads a copy of the files that were verified",
        why="a folder can change between the decision and a reading, and evicted adapters are read again",
        upstream="vllm/lora/worker_manager.py:106",
        until="adapters have a check that plugins can add to",
    ),
    Patch(
        target=_RUNNER + "remove_lora",
        parameters="self lora_id",
        by="icarus.vllm.worker.adapters:removing",
        what="that copy goes with its adapter",
        why="adapters that come and go would fill the disk",
        upstream="vllm/v1/worker/lora_model_runner_mixin.py:290",
        until="vLLM keeps adapters that it evicts itself",
    ),
    Patch(
        target="vllm.lora.model_manager:get_punica_wrapper",
        parameters="args kwargs",
        by="icarus.vllm.cpu.lora:choosing",
        what="on CPUs LoRA layers take runs of rows (ICARUS_CPU_LORA=0 restores stock)",
        why="stock operators copy an adapter's weights for every row, rows without an adapter included",
        upstream="vllm/lora/punica_wrapper/punica_selector.py:13",
        until="vLLM's CPU operators do so",
    ),
    Patch(
        target="vllm.lora.model_manager:LoRAModelManager.activate_adapter",
        parameters="self lora_id",
        by="icarus.vllm.cpu.lora:adopting",
        what="those operators learn which weights are new",
        why="they keep B in another order, and skip layers that an adapter does not have",
        upstream="vllm/lora/model_manager.py:346",
        until="vLLM's CPU operators do so",
    ),
    Patch(
        target=_RUNNER + "_get_prompt_logprobs_dict",
        parameters="self hidden_states num_scheduled_tokens",
        by="icarus.vllm.cpu.lora:scoring",
        what="those operators learn that logits are of a prompt",
        why="its rows are not the sampled ones, whose adapters of lm_head they would get",
        upstream="vllm/v1/worker/gpu_model_runner.py:5306",
        until="vLLM maps rows of prompts to adapters where it scores them (issue 51594)",
    ),
    Patch(
        target="vllm.platforms.cpu:CpuPlatform.check_and_update_config",
        parameters="vllm_config",
        by="icarus.vllm.cpu.lora:compiling",
        what="torch.compile stays on with LoRA",
        why="those operators are opaque to it, and all models are slower without it",
        upstream="vllm/platforms/cpu.py:216",
        until="vLLM's CPU operators can be compiled around",
    ),
    Patch(
        target="vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.build",
        parameters="self common_prefix_len common_attn_metadata fast_build",
        by="icarus.vllm.cpu.attention:building",
        what="on CPUs a decode and its decoder row become one request with twice the heads",
        why="as two they are two passes over the same keys and values",
        upstream="vllm/v1/attention/backends/cpu_attn.py:199",
        until="a request may have several query rows at one position",
    ),
    Patch(
        target="vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward",
        parameters="self layer query key value kv_cache attn_metadata output output_scale output_block_scale",
        by="icarus.vllm.cpu.attention:attending",
        what="the pass over their keys",
        why="it has other rows and heads than the step",
        upstream="vllm/v1/attention/backends/cpu_attn.py:344",
        until="a request may have several query rows at one position",
    ),
    Patch(
        target="vllm.v1.core.block_pool:BlockPool.cache_full_blocks",
        parameters="self request blocks num_cached_blocks num_full_blocks block_size kv_cache_group_id block_mask",
        by="icarus.vllm.engine.counting:writing",
        what="the model whose request wrote a block is remembered",
        why="a metric tells who reads whose blocks",
        upstream="vllm/v1/core/block_pool.py:226",
        until="vLLM counts prefix-cache hits by adapter",
    ),
    Patch(
        target="vllm.v1.core.kv_cache_manager:KVCacheManager.record_prefix_cache_stats",
        parameters="self request num_hits",
        by="icarus.vllm.engine.counting:hitting",
        what="prefix-cache hits are counted by writer and reader",
        why="a metric tells who reads whose blocks",
        upstream="vllm/v1/core/kv_cache_manager.py:253",
        until="vLLM counts prefix-cache hits by adapter",
    ),
    Patch(
        target="vllm.v1.engine.core:EngineCore.collective_rpc",
        parameters="self method timeout args kwargs",
        by="icarus.vllm.engine.counting:answering",
        what="one more question, which the engine core answers itself: the plugin's counters",
        why="they are in the core and the workers, and metrics are served by the front end",
        upstream="vllm/v1/engine/core.py:1073",
        until="a plugin may add methods that the front end can call",
    ),
    Patch(
        target="vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter",
        parameters="self request base_model_name",
        by="icarus.vllm.server.loading:checking",
        what="adapters that cannot be served are refused with 400, paths outside the allowed folders with 403",
        why="an error in the engine core is the server's (500) and not the client's",
        upstream="vllm/entrypoints/openai/models/serving.py:163",
        until="adapters have a check that plugins can add to",
    ),
    Patch(
        target="vllm.entrypoints.openai.models.serving:OpenAIServingModels.unload_lora_adapter",
        parameters="self request",
        by="icarus.vllm.server.loading:releasing",
        what="an ICaRus adapter that is unloaded leaves the engine with its last request",
        why="unloading takes a name away and keeps slot, memory and copy",
        upstream="vllm/entrypoints/openai/models/serving.py:212",
        until="vLLM removes unloaded adapters from the engine (issues 42207, 54839)",
    ),
)


def apply(ledger: Iterable[Patch], version: str) -> int:
    """Apply all records, or none; returns how many were not applied before. Raises PatchError.

    ``ICARUS_UNTESTED_VLLM=1`` lets another version pass whose functions still take the same parameters: it is for
    running the test suite against it (``make test-vllm VLLM=...``).
    """
    if _release(version) not in TESTED and os.environ.get("ICARUS_UNTESTED_VLLM") != "1":
        raise PatchError(
            f"ICaRus patches vLLM {', '.join(TESTED)} and this is {version}: install one of those, or set "
            "VLLM_PLUGINS='' to serve without ICaRus."
        )
    todo = [(patch, *found) for patch in ledger if (found := _find(patch, version))]
    for patch, owner, name, stock in todo:
        stand_in = _resolve(patch.by)(stock)
        setattr(stand_in, _SENTINEL, patch.target)
        # What wraps a class method has its class already.
        setattr(owner, name, staticmethod(stand_in) if ismethod(stock) else stand_in)
    return len(todo)


def _release(version: str) -> str:
    """Without the part that names a build, as in 0.32.0+cpu."""
    return version.partition("+")[0]


def _find(patch: Patch, version: str) -> tuple[Any, str, Callable[..., Any]] | None:
    """Where the original is to be replaced; None if it has been."""
    module, _, path = patch.target.partition(":")
    *owners, name = path.split(".")
    try:
        owner = import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        stock = getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise PatchError(f"vLLM {version} has no {patch.target} ({error}): {_REMEDY}") from error
    if getattr(stock, _SENTINEL, None) == patch.target:
        return None
    found, wanted = list(signature(stock).parameters), patch.parameters.split()
    if found not in (wanted, patch.before.split()):
        raise PatchError(f"{patch.target} of vLLM {version} takes {found} and not {wanted}: {_REMEDY}")
    return owner, name, stock


_REMEDY = f"install vLLM {TESTED[-1]} as it was released, or set VLLM_PLUGINS='' to serve without ICaRus."


def _resolve(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), function)
    return found
