"""The ledger: everything that the plugin changes in vLLM, by the hook that vLLM lacks.

A hook says what vLLM would have to offer for its changes to go, and why they are needed until then. A change names a
function of vLLM, what changes in it and why, and where it stands. ``patching.py`` checks the changes against the
installed vLLM and applies them.
"""

from __future__ import annotations

from icarus.vllm.patching import READ_ONCE, Hook, Override, Patch

TESTED = ("0.31.0", "0.32.0")
"""Versions of vLLM that the test suite ran against."""

CHECKED = ("0.33.0",)
"""Versions without a build for the machines that the suite runs on. Their source was compared with that of the newest
tested one (``make check-vllm``), all that had changed was read, and tests ran on their Python files over compiled files
of that version (``make test-sources``); docs/inside-vllm.md has which, and what was found."""

ROOM = Hook(
    until="plugins can change the configuration before it is checked",
    why="decoder rows come on top of what is scheduled, and two numbers of the configuration size every buffer",
)
SHARED = Hook(
    until="a LoRARequest can say that it leaves the cache unchanged",
    why="an ICaRus adapter reads and writes the base model's K/V, and vLLM takes those of every adapter for its own",
)
CHECKS = Hook(
    until="plugins can check adapters before they are loaded, and vLLM keeps what was checked",
    why="what shares the cache has to be verified, and a folder may change after the decision",
)
COST = Hook(
    until="the scheduler asks how many rows a request takes",
    why="a scored prompt needs a decoder row for each of its rows, and buffers have room for a fixed number",
)
ROWS = Hook(
    until="the model runner asks for rows to append to a step",
    why="scheduled rows write the cache on base weights, and decoder rows behind them predict",
    issue="51212",
)
OPERATORS = Hook(
    until="vLLM's CPU operators take runs of rows and are opaque to torch.compile",
    why="they copy an adapter's weights for every row, and give rows without an adapter those of the last slot",
)
PROMPTS = Hook(
    until="vLLM maps the rows of scored prompts to adapters",
    why="it computes their logits with the mapping of sampled rows",
    issue="51594",
)
QUERIES = Hook(
    until="a request can have several query rows at one position",
    why="a decode and its decoder row read the same keys and values, and two requests read them twice",
)
COUNTERS = Hook(
    until="vLLM counts prefix-cache hits by adapter, and plugins can add methods for the front end",
    why="a metric shows whose blocks each model reads",
)
MODALITIES = Hook(
    until="vLLM asks default_mm_loras which adapters stand for a modality",
    why="it takes an adapter that is named like the type of a message's part for that",
)
UNLOADING = Hook(
    until="vLLM removes unloaded adapters from the engine",
    why="it takes the name away, and keeps slot and memory",
    issue="42207, 54839",
)
BEAMS = Hook(
    until="vLLM fills num_cached_tokens of a beam search's output",
    why="every other answer has it",
)

_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner."
_OURS = "icarus.vllm.worker.runner_v1:"
_RUNNER_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner."
_OURS_V2 = "icarus.vllm.worker.runner_v2:"

LEDGER = (
    Patch(
        hook=ROOM,
        target="vllm.config.vllm:VllmConfig.__post_init__",
        parameters="self",
        by="icarus.vllm.engine.core:wrap_post_init",
        what="with LoRA on, buffers have room for decoder rows on top of the rows that may be scheduled",
        why="max_num_batched_tokens and max_num_seqs size every buffer, and decoder rows come on top of them",
        upstream="vllm/config/vllm.py:1414",
    ),
    Patch(
        hook=SHARED,
        target="vllm.v1.core.kv_cache_utils:_gen_lora_extra_hash_keys",
        parameters="request",
        by="icarus.vllm.engine.core:wrap_gen_lora_extra_hash_keys",
        what="the cache key of a request whose adapter shares names no adapter; that of others has its version, too",
        why="its K/V is the base model's; by name alone (in stock vLLM) a replaced adapter finds K/V of old weights",
        upstream="vllm/v1/core/kv_cache_utils.py:578",
    ),
    Patch(
        hook=SHARED,
        target="vllm.v1.engine.core:EngineCore.preprocess_add_request",
        parameters="self request",
        by="icarus.vllm.engine.core:wrap_preprocess_add_request",
        what="requests whose adapter is verified are marked",
        why="cache keys, KV events and workers must follow one decision",
        upstream="vllm/v1/engine/core.py:1089",
    ),
    Patch(
        hook=CHECKS,
        target="vllm.v1.engine.core:EngineCore._initialize_kv_caches",
        parameters="self vllm_config",
        by="icarus.vllm.engine.ranks:wrap_initialize_kv_caches",
        what="the engine core asks each worker for its plugin and its model runner, before it serves an adapter",
        why="workers decide by environments of their own, and an ICaRus adapter on another runner would be plain LoRA",
        upstream="vllm/v1/engine/core.py:261",
    ),
    Patch(
        hook=CHECKS,
        target="vllm.v1.engine.core:EngineCore.add_lora",
        parameters="self lora_request",
        by="icarus.vllm.engine.core:wrap_add_lora",
        what="an adapter is verified, or verified again, before workers read it",
        why="the decision must be about the files that are loaded",
        upstream="vllm/v1/engine/core.py:1051",
    ),
    Patch(
        hook=CHECKS,
        target="vllm.v1.engine.core:EngineCore.remove_lora",
        parameters="self lora_id",
        by="icarus.vllm.engine.core:wrap_remove_lora",
        what="the verdict on an adapter is forgotten with the adapter",
        why="another adapter may come under the same id",
        upstream="vllm/v1/engine/core.py:1054",
    ),
    Patch(
        hook=CHECKS,
        target="vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        parameters="self request_id prompt params supported_tasks arrival_time lora_request tokenization_kwargs "
        "trace_headers priority data_parallel_rank resumable session_id kv_hints",
        by="icarus.vllm.server.requests:wrap_process_inputs",
        what="a request for a refused adapter is a bad request (400)",
        why="an error in the engine core is reported as the server's (500)",
        upstream="vllm/v1/engine/input_processor.py:373",
    ),
    Patch(
        hook=CHECKS,
        target="vllm.lora.worker_manager:WorkerLoRAManager._load_adapter",
        parameters="self lora_request",
        by="icarus.vllm.worker.adapters:wrap_load_adapter",
        what="a worker reads a copy of the files that were verified",
        why="a folder may change after the decision, and evicted adapters are read again",
        upstream="vllm/lora/worker_manager.py:106",
    ),
    Patch(
        hook=CHECKS,
        target="vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter",
        parameters="self request base_model_name",
        by="icarus.vllm.server.loading:wrap_load_lora_adapter",
        what="adapters that cannot be served, and names with another meaning, are refused with 400, paths outside the "
        "allowed folders with 403",
        why="an error in the engine core is reported as the server's (500)",
        upstream="vllm/entrypoints/openai/models/serving.py:167",
    ),
    Patch(
        hook=CHECKS,
        target="vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.remove_lora",
        parameters="self lora_id",
        by="icarus.vllm.worker.adapters:wrap_remove_lora",
        what="the copy is deleted with its adapter",
        why="copies would fill the disk",
        upstream="vllm/v1/worker/lora_model_runner_mixin.py:290",
    ),
    Patch(
        hook=COST,
        target="vllm.v1.core.sched.scheduler:Scheduler._reserve_prefill_lookahead",
        parameters="self request num_computed_tokens num_new_tokens",
        by="icarus.vllm.engine.core:wrap_reserve_prefill_lookahead",
        what="prompts with prompt_logprobs are prefilled in smaller chunks",
        why="each of their rows needs a decoder row, and buffers have room for a fixed number of these",
        upstream="vllm/v1/core/sched/scheduler.py:570",
    ),
    Patch(
        hook=ROWS,
        target="vllm.v1.worker.gpu_worker:Worker.__init__",
        parameters="self vllm_config local_rank rank distributed_init_method is_driver_worker",
        by="icarus.vllm.worker.choice:wrap_init",
        what="the changes in the model runner that this worker is about to make are applied",
        why="vLLM chooses the runner by the configuration, in each worker",
        upstream="vllm/v1/worker/gpu_worker.py:193",
    ),
    Patch(
        hook=ROWS,
        target=_RUNNER + "execute_model",
        parameters="self scheduler_output intermediate_tensors",
        runner="V1",
        by=_OURS + "wrap_execute_model",
        what="blocks with NaN are cleaned before others get them, and the plan of a step is dropped when the step ends",
        why="attention multiplies masked slots of a block by 0, and 0 x NaN is NaN (in stock vLLM, too); warm-up and "
        "idle steps have no decoder rows",
        upstream="vllm/v1/worker/gpu_model_runner.py:3940",
    ),
    Patch(
        hook=ROWS,
        target=_RUNNER + "set_active_loras",
        parameters="self input_batch num_scheduled_tokens num_sampled_tokens mapping_type",
        runner="V1",
        by=_OURS + "wrap_set_active_loras",
        what="scheduled rows of requests that share run on base weights, and their decoder rows on the adapter",
        why="scheduled rows write the cache, and decoder rows predict",
        upstream="vllm/v1/worker/lora_model_runner_mixin.py:83",
    ),
    Patch(
        hook=ROWS,
        target=_RUNNER + "_prepare_inputs",
        parameters="self scheduler_output num_scheduled_tokens",
        runner="V1",
        by=_OURS + "wrap_prepare_inputs",
        what="decoder requests are appended to the step, and sampling reads decoder rows",
        why="to attention, the decoder rows of a request are another request",
        upstream="vllm/v1/worker/gpu_model_runner.py:1920",
    ),
    Patch(
        hook=ROWS,
        target=_RUNNER + "_determine_batch_execution_and_padding",
        parameters="self num_tokens num_reqs num_scheduled_tokens_np max_num_scheduled_tokens use_cascade_attn "
        "allow_microbatching force_eager force_uniform_decode force_has_lora force_num_active_loras num_encoder_reqs",
        runner="V1",
        by=_OURS + "wrap_determine_batch_execution_and_padding",
        what="padding, CUDA graphs and data-parallel ranks count decoder rows",
        why="the numbers of rows and adapters choose the graph",
        upstream="vllm/v1/worker/gpu_model_runner.py:3718",
    ),
    Patch(
        hook=ROWS,
        target=_RUNNER + "_get_slot_mappings",
        parameters="self num_tokens_padded num_reqs_padded num_tokens_unpadded ubatch_slices",
        runner="V1",
        by=_OURS + "wrap_get_slot_mappings",
        what="decoder rows have slot -1",
        why="they must not write the cache",
        upstream="vllm/v1/worker/gpu_model_runner.py:3856",
    ),
    Patch(
        hook=ROWS,
        target=_RUNNER + "_build_attention_metadata",
        parameters="self num_tokens num_reqs max_query_len num_tokens_padded num_reqs_padded ubatch_slices "
        "logits_indices max_num_sampled_tokens use_spec_decode for_cudagraph_capture num_scheduled_tokens "
        "slot_mappings",
        before=(
            "self num_tokens num_reqs max_query_len num_tokens_padded num_reqs_padded ubatch_slices "
            "logits_indices max_num_sampled_tokens use_spec_decode for_cudagraph_capture num_scheduled_tokens "
            "cascade_attn_prefix_lens slot_mappings",
        ),
        runner="V1",
        by=_OURS + "wrap_build_attention_metadata",
        what="attention sees decoder requests",
        why="each of them reads the cache of its source request",
        upstream="vllm/v1/worker/gpu_model_runner.py:2249",
    ),
    Patch(
        hook=ROWS,
        target=_RUNNER + "_preprocess",
        parameters="self scheduler_output num_input_tokens intermediate_tensors",
        runner="V1",
        by=_OURS + "wrap_preprocess",
        what="decoder rows get the token, position and embedding of their source rows",
        why="both streams start from the same embedding",
        upstream="vllm/v1/worker/gpu_model_runner.py:3292",
    ),
    Patch(
        hook=ROWS,
        target=_RUNNER + "_prepare_padding_mask",
        parameters="self num_tokens_unpadded num_tokens_padded",
        runner="V1",
        by=_OURS + "wrap_prepare_padding_mask",
        what="decoder rows are not taken for padding",
        why="models that skip padding would skip them",
        upstream="vllm/v1/worker/gpu_model_runner.py:3273",
    ),
    Patch(
        hook=ROWS,
        target=_RUNNER + "_dummy_sampler_run",
        parameters="self hidden_states",
        by="icarus.vllm.worker.warmup:wrap_dummy_sampler_run",
        what="the sampler is warmed up for the requests that may run, without room for decoder requests",
        why="logits of more requests would take memory from the KV cache, and decoder requests are not sampled twice",
        upstream="vllm/v1/worker/gpu_model_runner.py:5927",
        runner="V1",
    ),
    Patch(
        hook=ROWS,
        target=_RUNNER + "_model_forward",
        parameters="self input_ids positions intermediate_tensors inputs_embeds model_kwargs",
        runner="V1",
        by=_OURS + "wrap_model_forward",
        what="blocks of rows that are not finite are noted; with prompt_logprobs, hidden states of decoder rows "
        "replace those of their source rows",
        why="such blocks spoil whoever gets them next (in stock vLLM, too); vLLM reads prompt logprobs from scheduled "
        "rows, and they must be the specialist's",
        upstream="vllm/v1/worker/gpu_model_runner.py:3620",
    ),
    Override(
        hook=ROWS,
        target=_RUNNER_V2 + "initialize_kv_cache",
        parameters="self kv_cache_config is_profiling kv_cache_allocation_context",
        runner="V2",
        by=_OURS_V2 + "DecoderRowsRunner.initialize_kv_cache",
        what="block tables and CUDA graphs have room for decoder requests",
        why="they come on top of the requests that are scheduled",
        upstream="vllm/v1/worker/gpu/model_runner.py:605",
    ),
    Override(
        hook=ROWS,
        target=_RUNNER_V2 + "prepare_dummy_attn",
        parameters="self input_batch valid_state_slots",
        runner="V2",
        by=_OURS_V2 + "DecoderRowsRunner.prepare_dummy_attn",
        what="dummy batches name states of requests that exist",
        why="graphs take more requests than may be scheduled, and states are kept for the latter",
        upstream="vllm/v1/worker/gpu/model_runner.py:1576",
    ),
    Override(
        hook=ROWS,
        target=_RUNNER_V2 + "gather_batch_req_state",
        parameters="self scheduler_output dummy_run",
        runner="V2",
        by=_OURS_V2 + "DecoderRowsRunner.gather_batch_req_state",
        what="the step's decoder rows are planned",
        why="here the order of requests is known, and nothing has been sized",
        upstream="vllm/v1/worker/gpu/model_runner.py:1272",
    ),
    Override(
        hook=ROWS,
        target=_RUNNER_V2 + "execute_model",
        parameters="self scheduler_output intermediate_tensors dummy_run skip_attn_for_dummy_run is_profile "
        "context_len valid_dummy_state_slots randomize_inputs",
        runner="V2",
        by=_OURS_V2 + "DecoderRowsRunner.execute_model",
        what="sampling gets the batch as it was, with decoder rows to read; blocks with NaN are cleaned before others "
        "get them",
        why="decoder requests are part of the forward pass alone; attention multiplies masked slots of a block by 0, "
        "and 0 x NaN is NaN (in stock vLLM, too)",
        upstream="vllm/v1/worker/gpu/model_runner.py:1719",
    ),
    Override(
        hook=ROWS,
        target=_RUNNER_V2 + "prepare_inputs",
        parameters="self scheduler_output batch_req_state batch_desc num_active_loras",
        runner="V2",
        by=_OURS_V2 + "DecoderRowsRunner.prepare_inputs",
        what="decoder requests and their rows are appended to the batch",
        why="to attention, the decoder rows of a request are another request",
        upstream="vllm/v1/worker/gpu/model_runner.py:1354",
    ),
    Override(
        hook=ROWS,
        target=_RUNNER_V2 + "prepare_attn",
        parameters="self input_batch",
        runner="V2",
        by=_OURS_V2 + "DecoderRowsRunner.prepare_attn",
        what="decoder requests have their sources' blocks, and decoder rows have slot -1",
        why="they read the cache and must not write it",
        upstream="vllm/v1/worker/gpu/model_runner.py:1556",
    ),
    Override(
        hook=ROWS,
        target=_RUNNER_V2 + "_set_active_loras",
        parameters="self prompt_lora_mapping token_lora_mapping lora_requests mapping_type",
        runner="V2",
        by=_OURS_V2 + "DecoderRowsRunner._set_active_loras",
        what="scheduled rows of requests that share run on base weights, and their decoder rows on the adapter",
        why="scheduled rows write the cache, and decoder rows predict",
        upstream="vllm/v1/worker/lora_model_runner_mixin.py:58",
    ),
    Patch(
        hook=ROWS,
        target="vllm.v1.worker.gpu.model_runner:GPUModelRunner",
        parameters="vllm_config device",
        runner="V2",
        by=_OURS_V2 + "wrap_gpu_model_runner",
        what="a GPU worker makes a runner with decoder rows",
        why="the methods above are those of a subclass",
        upstream="vllm/v1/worker/gpu/model_runner.py:193",
    ),
    Patch(
        hook=ROWS,
        target="vllm.v1.worker.cpu.model_runner:CPUModelRunner",
        parameters="vllm_config device",
        runner="V2",
        by=_OURS_V2 + "wrap_cpu_model_runner",
        what="a CPU worker makes a runner with decoder rows",
        why="the methods above are those of a subclass",
        upstream="vllm/v1/worker/cpu/model_runner.py:10",
    ),
    Patch(
        hook=ROWS,
        target="vllm.v1.worker.gpu.model_runner:dispatch_cg_and_sync_dp",
        parameters="cudagraph_manager num_reqs num_tokens uniform_token_count dp_size dp_rank max_query_len "
        "need_eager num_active_loras parallel_config allow_ubatching uniform_decode allow_skip_drafts dp_sync_state",
        before=(
            "cudagraph_manager num_reqs num_tokens uniform_token_count dp_size dp_rank max_query_len "
            "need_eager num_active_loras parallel_config allow_ubatching uniform_decode dp_sync_state",
            "cudagraph_manager num_reqs num_tokens uniform_token_count dp_size dp_rank max_query_len "
            "need_eager num_active_loras parallel_config allow_ubatching uniform_decode dp_sync",
        ),
        runner="V2",
        by=_OURS_V2 + "wrap_dispatch_cg_and_sync_dp",
        what="padding, CUDA graphs and data-parallel ranks count decoder rows",
        why="the numbers of rows and adapters choose the graph",
        upstream="vllm/v1/worker/gpu/dp_utils.py:213",
    ),
    Patch(
        hook=ROWS,
        target="vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_inputs_embeds",
        parameters="self scheduled_encoder_inputs input_batch req_states",
        runner="V2",
        by=_OURS_V2 + "wrap_prepare_inputs_embeds",
        what="decoder rows get the embeddings of their source rows",
        why="both streams start from the same embedding",
        upstream="vllm/v1/worker/gpu/model_states/default.py:100",
    ),
    Patch(
        hook=ROWS,
        target="vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_inputs",
        parameters="self input_batch req_states",
        runner="V2",
        by=_OURS_V2 + "wrap_prepare_inputs",
        what="decoder rows get the positions of their source rows, with M-RoPE as well",
        why="both streams stand at the same position",
        upstream="vllm/v1/worker/gpu/model_states/default.py:146",
    ),
    Patch(
        hook=OPERATORS,
        target="vllm.lora.model_manager:get_punica_wrapper",
        parameters="args kwargs",
        by="icarus.vllm.cpu.lora:wrap_get_punica_wrapper",
        what="on CPUs, ICaRus's LoRA operator takes runs of rows with one adapter (ICARUS_CPU_LORA=0 restores vLLM's)",
        why="vLLM's operators copy an adapter's weights for every row, even for rows without an adapter",
        upstream="vllm/lora/punica_wrapper/punica_selector.py:13",
    ),
    Patch(
        hook=OPERATORS,
        target="vllm.lora.model_manager:LoRAModelManager.activate_adapter",
        parameters="self lora_id",
        by="icarus.vllm.cpu.lora:wrap_activate_adapter",
        what="ICaRus's LoRA operator is told which weights are new",
        why="it keeps B in another order, and skips layers that an adapter does not have",
        upstream="vllm/lora/model_manager.py:346",
    ),
    Patch(
        hook=OPERATORS,
        target="vllm.platforms.cpu:CpuPlatform.check_and_update_config",
        parameters="vllm_config",
        by="icarus.vllm.cpu.lora:wrap_check_and_update_config",
        what="on CPUs, torch.compile stays on with LoRA",
        why="ICaRus's LoRA operator is opaque to it, and all models are slower without it",
        upstream="vllm/platforms/cpu.py:216",
    ),
    Patch(
        hook=PROMPTS,
        target=_RUNNER + "_get_prompt_logprobs_dict",
        parameters="self hidden_states num_scheduled_tokens",
        runner="V1",
        by="icarus.vllm.cpu.lora:wrap_get_prompt_logprobs_dict",
        what="ICaRus's LoRA operator is told that logits are a prompt's",
        why="it would apply the lm_head adapters of the sampled rows to them",
        upstream="vllm/v1/worker/gpu_model_runner.py:5306",
    ),
    Patch(
        hook=PROMPTS,
        target="vllm.v1.worker.gpu.sample.prompt_logprob:PromptLogprobsWorker.compute_prompt_logprobs",
        parameters="self logits_fn hidden_states input_batch all_token_ids num_computed_tokens prompt_lens",
        runner="V2",
        by="icarus.vllm.cpu.lora:wrap_compute_prompt_logprobs",
        what="ICaRus's LoRA operator is told that logits are a prompt's",
        why="it would apply the lm_head adapters of the sampled rows to them",
        upstream="vllm/v1/worker/gpu/sample/prompt_logprob.py:120",
    ),
    Patch(
        hook=PROMPTS,
        target="vllm.v1.worker.gpu.sample.prompt_logprob:PromptLogprobsWorker.compute_prompt_token_id_logprobs",
        parameters="self logits_fn hidden_states input_batch prompt_lens",
        runner="V2",
        by="icarus.vllm.cpu.lora:wrap_compute_prompt_token_id_logprobs",
        what="ICaRus's LoRA operator is told that logits are a prompt's",
        why="it would apply the lm_head adapters of the sampled rows to them",
        upstream="vllm/v1/worker/gpu/sample/prompt_logprob.py:69",
    ),
    Patch(
        hook=QUERIES,
        target="vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.build",
        parameters="self common_prefix_len common_attn_metadata fast_build",
        by="icarus.vllm.cpu.attention:wrap_build",
        what="on CPUs, a decode and its decoder row become one request with twice the query heads",
        why="two requests would be two passes over the same keys and values",
        upstream="vllm/v1/attention/backends/cpu_attn.py:199",
    ),
    Patch(
        hook=QUERIES,
        target="vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward",
        parameters="self layer query key value kv_cache attn_metadata output output_scale output_block_scale",
        by="icarus.vllm.cpu.attention:wrap_forward",
        what="such pairs are attended in a pass of their own",
        why="they have other numbers of rows and heads than the step",
        upstream="vllm/v1/attention/backends/cpu_attn.py:344",
    ),
    Patch(
        hook=QUERIES,
        target="vllm.v1.attention.backends.triton_attn:TritonAttentionMetadataBuilder.build",
        parameters="self common_prefix_len common_attn_metadata fast_build",
        runner=READ_ONCE,
        by="icarus.vllm.gpu.attention:wrap_build",
        what="a decode and its decoder row become one request with two queries and no mask",
        why="two requests would be two passes over the same keys and values",
        upstream="vllm/v1/attention/backends/triton_attn.py:209",
    ),
    Patch(
        hook=QUERIES,
        target="vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.forward",
        parameters="self layer query key value kv_cache attn_metadata output output_scale output_block_scale",
        runner=READ_ONCE,
        by="icarus.vllm.gpu.attention:wrap_forward",
        what="the rows of such a pair are brought side by side, and results back",
        why="a kernel takes the queries of a request from neighbouring rows",
        upstream="vllm/v1/attention/backends/triton_attn.py:549",
    ),
    Patch(
        hook=QUERIES,
        target="vllm.v1.attention.backends.flash_attn:FlashAttentionMetadataBuilder.build",
        parameters="self common_prefix_len common_attn_metadata fast_build",
        runner=READ_ONCE,
        by="icarus.vllm.gpu.attention:wrap_build",
        what="a decode and its decoder row become one request with two queries and no mask",
        why="two requests would be two passes over the same keys and values",
        upstream="vllm/v1/attention/backends/flash_attn.py:809",
    ),
    Patch(
        hook=QUERIES,
        target="vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.forward",
        parameters="self layer query key value kv_cache attn_metadata output output_scale output_block_scale",
        runner=READ_ONCE,
        by="icarus.vllm.gpu.attention:wrap_forward",
        what="the rows of such a pair are brought side by side, and results back",
        why="a kernel takes the queries of a request from neighbouring rows",
        upstream="vllm/v1/attention/backends/flash_attn.py:1177",
    ),
    Patch(
        hook=COUNTERS,
        target="vllm.v1.core.block_pool:BlockPool.cache_full_blocks",
        parameters="self request blocks num_cached_blocks num_full_blocks block_size kv_cache_group_id block_mask",
        by="icarus.vllm.engine.counting:wrap_cache_full_blocks",
        what="the model whose request wrote a block is remembered",
        why="a metric shows whose blocks each model reads",
        upstream="vllm/v1/core/block_pool.py:226",
    ),
    Patch(
        hook=COUNTERS,
        target="vllm.v1.core.kv_cache_manager:KVCacheManager.record_prefix_cache_stats",
        parameters="self request num_hits",
        by="icarus.vllm.engine.counting:wrap_record_prefix_cache_stats",
        what="prefix-cache hits are counted by writer and reader",
        why="a metric shows whose blocks each model reads",
        upstream="vllm/v1/core/kv_cache_manager.py:253",
    ),
    Patch(
        hook=MODALITIES,
        target="vllm.entrypoints.openai.models.serving:OpenAIServingModels.resolve_lora",
        parameters="self lora_name",
        by="icarus.vllm.server.loading:wrap_resolve_lora",
        what="resolvers bring no adapter that is named like the type of a message's part",
        why="vLLM answers base-model requests with such parts by an adapter of that name (stock vLLM does, too)",
        upstream="vllm/entrypoints/openai/models/serving.py:300",
    ),
    Patch(
        hook=UNLOADING,
        target="vllm.entrypoints.openai.models.serving:OpenAIServingModels.unload_lora_adapter",
        parameters="self request",
        by="icarus.vllm.server.loading:wrap_unload_lora_adapter",
        what="an unloaded adapter leaves the engine with its last request",
        why="vLLM's unloading removes the name, and keeps slot and memory",
        upstream="vllm/entrypoints/openai/models/serving.py:231",
    ),
    Patch(
        hook=BEAMS,
        target="vllm.entrypoints.generate.beam_search.online:BeamSearchOnlineMixin.beam_search",
        parameters="self prompt request_id params lora_request trace_headers session_id priority",
        before=("self prompt request_id params lora_request trace_headers session_id",),
        by="icarus.vllm.server.beam_search:wrap_beam_search",
        what="answers of beam searches say how many prompt tokens were in the cache",
        why="cached_tokens are in every other answer (stock vLLM drops them here)",
        upstream="vllm/entrypoints/generate/beam_search/online.py:28",
    ),
)


def changes(runner: str = "") -> tuple[Patch, ...]:
    """Changes of every process that loads plugins, or of a worker with model runner ``V1`` or ``V2``, or READ_ONCE."""
    return tuple(patch for patch in LEDGER if patch.runner == runner)
