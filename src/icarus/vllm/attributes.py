"""The attributes of vLLM's objects that the plugin reads or writes, by class.

They are as much a part of what the plugin rests on as the functions in the ledger: a buffer that is renamed would be an
error in the middle of a step, or of a load, and a new attribute under an old name would be written in silence. So they
are checked when a process starts (patching.py). Every attribute that our code names has a line here; a test looks.
"""

from __future__ import annotations

from icarus.vllm.patching import READ_ONCE, Attributes

_CONFIG = "vllm.config:"

ATTRIBUTES = (
    # ---------------------------------------------------------------------------------------- configuration
    Attributes(
        _CONFIG + "VllmConfig",
        "additional_config cache_config compilation_config device_config load_config lora_config model_config "
        "parallel_config scheduler_config speculative_config use_v2_model_runner",
    ),
    Attributes(
        _CONFIG + "ModelConfig",
        "architectures enforce_eager is_attention_free is_encoder_decoder is_hybrid is_mm_prefix_lm is_moe model "
        "revision runner_type rswa_window served_model_name use_mla",
    ),
    Attributes(
        _CONFIG + "ParallelConfig",
        "data_parallel_index decode_context_parallel_size enable_batch_sharded_sampling pipeline_parallel_size "
        "prefill_context_parallel_size use_ubatching",
    ),
    Attributes(
        _CONFIG + "SchedulerConfig",
        "max_num_active_seqs max_num_batched_tokens max_num_scheduled_tokens max_num_seqs",
    ),
    Attributes(_CONFIG + "CacheConfig", "cache_dtype kv_sharing_fast_prefill"),
    Attributes(
        _CONFIG + "CompilationConfig",
        "cudagraph_capture_sizes cudagraph_mode max_cudagraph_capture_size static_forward_context",
    ),
    Attributes(_CONFIG + "DeviceConfig", "device_type"),
    Attributes(_CONFIG + "LoadConfig", "download_dir"),
    Attributes(
        _CONFIG + "LoRAConfig", "default_mm_loras enable_tower_connector_lora fully_sharded_loras max_lora_rank"
    ),
    Attributes(_CONFIG + "SpeculativeConfig", "method num_speculative_tokens"),
    # -------------------------------------------------------------------------------------------- front end
    Attributes("vllm.v1.engine.input_processor:InputProcessor", "lora_config vllm_config"),
    Attributes("vllm.v1.engine.async_llm:AsyncLLM", "engine_core output_processor remove_lora vllm_config"),
    Attributes("vllm.v1.engine.core_client:AsyncMPClient", "call_utility_async"),
    Attributes("vllm.v1.engine.output_processor:OutputProcessor", "request_states"),
    Attributes("vllm.v1.engine.output_processor:RequestState", "lora_request"),
    Attributes(
        "vllm.entrypoints.openai.models.serving:OpenAIServingModels",
        "engine_client input_processor load_lora_adapter lora_requests lora_resolvers unload_lora_adapter",
    ),
    Attributes("vllm.entrypoints.serve.engine.protocol:ErrorResponse", "error"),
    Attributes("vllm.entrypoints.serve.engine.protocol:ErrorInfo", "message"),
    Attributes("vllm.outputs:RequestOutput", "num_cached_tokens"),
    # ------------------------------------------------------------------------------------------ engine core
    Attributes("vllm.v1.engine.core:EngineCore", "model_executor scheduler vllm_config"),
    Attributes("vllm.v1.executor.abstract:Executor", "collective_rpc"),
    Attributes("vllm.v1.core.sched.scheduler:Scheduler", "current_step kv_cache_config kv_cache_manager"),
    Attributes(
        "vllm.v1.core.kv_cache_manager:KVCacheManager",
        "block_pool coordinator kv_cache_config prefix_cache_lookup_enabled",
    ),
    Attributes("vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator", "get_blocks"),
    Attributes("vllm.v1.core.block_pool:BlockPool", "cached_block_hash_to_block"),
    Attributes("vllm.v1.core.kv_cache_utils:KVCacheBlock", "block_id is_null"),
    Attributes("vllm.v1.kv_cache_interface:KVCacheConfig", "kv_cache_groups"),
    Attributes("vllm.v1.kv_cache_interface:KVCacheGroupSpec", "kv_cache_spec"),
    Attributes("vllm.v1.kv_cache_interface:KVCacheSpec", "block_size"),
    Attributes("vllm.v1.kv_cache_interface:UniformTypeKVCacheSpecs", "kv_cache_specs"),
    Attributes("vllm.v1.request:Request", "lora_request num_preemptions num_prompt_tokens request_id sampling_params"),
    Attributes("vllm.sampling_params:SamplingParams", "prompt_logprob_token_ids prompt_logprobs"),
    Attributes("vllm.lora.request:LoRARequest", "adapter_id load_inplace lora_int_id lora_name lora_path name"),
    # ---------------------------------------------------------------------------------------------- workers
    Attributes("vllm.v1.worker.gpu_worker:Worker", "model_runner"),
    Attributes(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "_ensure_lora_enabled _init_kv_zero_meta _kv_block_zeroer _set_active_loras _zero_block_ids attn_groups "
        "compilation_config device discard_request_mask enable_prompt_embeds input_batch input_ids inputs_embeds "
        "kv_cache_config lora_manager max_num_reqs max_num_tokens mrope_positions num_prompt_logprobs "
        "optimistic_seq_lens_cpu positions query_start_loc scheduler_config seq_lens supports_mm_inputs uses_mrope "
        "vllm_config",
        runner="V1",
    ),
    Attributes(
        "vllm.v1.worker.gpu_input_batch:InputBatch",
        "block_table lora_id_to_lora_request num_computed_tokens_cpu_tensor num_prompt_tokens_cpu_tensor num_reqs "
        "req_ids request_lora_mapping",
        runner="V1",
    ),
    Attributes("vllm.v1.worker.block_table:MultiGroupBlockTable", "block_tables", runner="V1"),
    Attributes("vllm.v1.worker.block_table:BlockTable", "block_table num_blocks_per_row slot_mapping", runner="V1"),
    Attributes("vllm.v1.utils:CpuGpuBuffer", "copy_to_gpu gpu np", runner="V1"),
    Attributes(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
        "_init_kv_zero_meta attn_groups aux_output_connector block_tables compilation_config cudagraph_manager "
        "decode_query_len device execute_model_state input_buffers kv_block_zeroer kv_cache_config lora_config "
        "lora_manager lora_state max_num_reqs max_num_tokens model_state prompt_logprobs_worker req_states "
        "scheduler_config supports_mm_inputs uses_inputs_embeds vllm_config",
        runner="V2",
    ),
    Attributes(
        "vllm.v1.worker.gpu.model_runner:BatchReqState",
        "idx_mapping_np num_draft_tokens_np num_scheduled_tokens prefill_len_np req_ids",
        runner="V2",
    ),
    Attributes("vllm.v1.worker.gpu.model_runner:ExecuteModelState", "_replace hidden_states input_batch", runner="V2"),
    Attributes(
        "vllm.v1.worker.gpu.input_batch:InputBatch",
        "idx_mapping idx_mapping_np input_ids is_padding is_prefilling_np logits_indices "
        "num_computed_prefill_tokens_np num_computed_tokens_np num_reqs num_reqs_after_padding num_scheduled_tokens "
        "num_tokens num_tokens_after_padding positions prefill_len_np query_start_loc query_start_loc_np req_ids "
        "seq_lens seq_lens_cpu_upper_bound",
        runner="V2",
    ),
    Attributes(
        "vllm.v1.worker.gpu.input_batch:InputBuffers",
        "input_ids is_padding positions query_start_loc seq_lens",
        runner="V2",
    ),
    Attributes("vllm.v1.worker.gpu.states:RequestState", "num_computed_tokens_np prompt_len", runner="V2"),
    Attributes("vllm.v1.worker.gpu.buffer_utils:UvaBackedTensor", "np", runner="V2"),
    Attributes("vllm.v1.worker.gpu.lora_utils:LoraState", "lora_ids lora_requests", runner="V2"),
    Attributes(
        "vllm.v1.worker.gpu.block_table:BlockTables",
        "block_sizes slot_mappings",
        runner="V2",
    ),
    Attributes(
        "vllm.v1.worker.gpu.sample.prompt_logprob:PromptLogprobsWorker",
        "token_id_scores uses_prompt_logprobs",
        runner="V2",
    ),
    Attributes(
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState",
        "num_new_sampled_tokens_per_step rope_state",
        runner="V2",
    ),
    Attributes("vllm.v1.worker.utils:KVBlockZeroer", "zero_block_ids"),
    Attributes("vllm.v1.core.sched.output:SchedulerOutput", "scheduled_cached_reqs scheduled_new_reqs"),
    Attributes("vllm.v1.core.sched.output:NewRequestData", "block_ids num_computed_tokens"),
    Attributes(
        "vllm.v1.core.sched.output:CachedRequestData", "new_block_ids num_computed_tokens req_ids resumed_req_ids"
    ),
    Attributes("vllm.sequence:IntermediateTensors", "tensors"),
    # ------------------------------------------------------------------------------------- adapters in workers
    Attributes("vllm.lora.worker_manager:WorkerLoRAManager", "_adapter_manager"),
    Attributes(
        "vllm.lora.model_manager:LoRAModelManager",
        "_use_ep is_pooling_model lora_index_to_id modules packed_modules punica_wrapper_mapping",
    ),
    Attributes("vllm.lora.lora_model:LoRAModel", "loras"),
    Attributes("vllm.lora.lora_weights:LoRALayerWeights", "lora_a lora_b scaling"),
    Attributes("vllm.lora.layers:LoRAMapping", "index_mapping prompt_mapping"),
    Attributes("vllm.lora.layers.base:BaseLayerWithLoRA", "punica_wrapper"),
    *(
        Attributes(f"vllm.lora.layers.{layer}", "base_layer lora_a_stacked lora_b_stacked")
        for layer in (
            "base_linear:BaseLinearLayerWithLoRA",
            "classifier:ClassificationHeadWithLoRA",
            "logits_processor:LogitsProcessorWithLoRA",
            "vocab_parallel_embedding:VocabParallelEmbeddingWithLoRA",
        )
    ),
    Attributes("vllm.model_executor.layers.linear:LinearBase", "input_size"),
    Attributes("vllm.distributed.parallel_state:GroupCoordinator", "world_size"),
    # ----------------------------------------------------------------------------------------------- on CPUs
    Attributes(
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder",
        "dtype head_dim is_cross_attention is_encoder_only_attention isa kv_cache_dtype layer_names num_heads "
        "num_kv_heads vllm_config window_size",
    ),
    Attributes("vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl", "alibi_slopes num_kv_heads sinks"),
    Attributes(
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadata",
        "block_table causal dynamic_causal max_query_len num_actual_tokens query_start_loc scheduler_metadata seq_lens",
    ),
    Attributes(
        "vllm.v1.attention.backend:CommonAttentionMetadata",
        "block_table_tensor causal max_query_len num_actual_tokens query_start_loc query_start_loc_cpu seq_lens",
    ),
    Attributes("vllm.model_executor.layers.attention:Attention", "impl kv_cache"),
    Attributes("vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU", "update_metadata"),
    # ----------------------------------------------------------------------------------------------- on GPUs
    Attributes("vllm.v1.worker.utils:AttentionGroup", "get_metadata_builder", runner=READ_ONCE),
    Attributes("vllm.v1.attention.backend:AttentionType", "DECODER", runner=READ_ONCE),
    Attributes(_CONFIG + "CUDAGraphMode", "FULL has_full_cudagraphs mixed_mode", runner=READ_ONCE),
    *(
        Attributes(f"vllm.v1.attention.backends.{kind}", names, runner=READ_ONCE)
        for backend in ("triton_attn:TritonAttention", "flash_attn:FlashAttention")
        for kind, names in (
            (backend + "MetadataBuilder", "device layer_names vllm_config"),
            (backend + "Metadata", "causal max_query_len num_actual_tokens query_start_loc scheduler_metadata"),
        )
    ),
    Attributes(
        "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl",
        "alibi_slopes attn_type kv_cache_dtype sliding_window",
        runner=READ_ONCE,
    ),
    Attributes(
        "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl",
        "alibi_slopes attn_type kv_cache_dtype sliding_window vllm_flash_attn_version",
        runner=READ_ONCE,
    ),
)


def attributes(runner: str = "") -> tuple[Attributes, ...]:
    """Those that every process uses, or a worker with model runner ``V1`` or ``V2``, or READ_ONCE."""
    return tuple(record for record in ATTRIBUTES if record.runner == runner)
