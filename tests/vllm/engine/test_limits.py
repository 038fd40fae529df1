"""Room for decoder rows, and refusals: without vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icarus.errors import InputError
from icarus.vllm.cpu import lora_rows
from icarus.vllm.engine import limits

SIZES = st.integers(1, 5000)


def scheduler(seqs: int, tokens: int, active: int | None = None, scheduled: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_num_active_seqs=active,
        max_num_scheduled_tokens=scheduled,
    )


@given(SIZES, SIZES, st.none() | SIZES, st.none() | SIZES, st.integers(1, 4))
def test_room(seqs: int, tokens: int, active: int | None, scheduled: int | None, sampled: int) -> None:
    config = scheduler(seqs, tokens, active and min(active, seqs), scheduled and min(scheduled, tokens))
    before = (config.max_num_active_seqs or seqs, config.max_num_scheduled_tokens or tokens)
    limits.reserve_room(config, sampled)
    running, budget = config.max_num_active_seqs, config.max_num_scheduled_tokens
    assert (running, budget) == before, "nothing more and nothing less is scheduled"
    assert config.max_num_seqs >= 2 * running
    assert config.max_num_batched_tokens >= budget + sampled * running + limits.MAX_SCORED_ROWS
    assert config.max_num_batched_tokens >= config.max_num_seqs, "vLLM refuses less"
    once = vars(config).copy()
    limits.reserve_room(config, sampled)
    assert vars(config) == once


def config(**changes: Any) -> SimpleNamespace:
    parts: dict[str, dict[str, Any]] = {
        "parallel_config": {
            "pipeline_parallel_size": 1,
            "use_ubatching": False,
            "enable_batch_sharded_sampling": False,
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
        },
        "cache_config": {"kv_sharing_fast_prefill": False, "cache_dtype": "auto"},
        "device_config": {"device_type": "cpu"},
        "lora_config": {"enable_tower_connector_lora": False, "fully_sharded_loras": False},
        "model_config": {
            "runner_type": "generate",
            "is_encoder_decoder": False,
            "use_mla": False,
            "is_hybrid": False,
            "is_attention_free": False,
            "is_mm_prefix_lm": False,
            "rswa_window": None,
            "architectures": ["LlamaForCausalLM"],
        },
    }
    top: dict[str, Any] = {"speculative_config": None}
    for name, value in changes.items():
        holder = next((part for part in parts.values() if name in part), top)
        assert name in holder
        holder[name] = value
    return SimpleNamespace(**top, **{name: SimpleNamespace(**part) for name, part in parts.items()})


def test_an_ordinary_engine_is_not_refused() -> None:
    assert limits.refusal(config()) == ""
    assert limits.refusal(config(speculative_config=SimpleNamespace(method="ngram"))) == ""


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 1"),
        ({"use_ubatching": True}, "--enable-dbo"),
        ({"enable_batch_sharded_sampling": True}, "--enable-batch-sharded-sampling"),
        ({"decode_context_parallel_size": 2}, "--decode-context-parallel-size 1"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size 1"),
        ({"speculative_config": SimpleNamespace(method="eagle3")}, "--speculative-config"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"enable_tower_connector_lora": True}, "--enable-tower-connector-lora"),
        ({"runner_type": "pooling"}, "--runner generate"),
        ({"is_encoder_decoder": True}, "decoder-only"),
        ({"use_mla": True}, "MLA"),
        ({"is_hybrid": True}, "all attention"),
        ({"is_attention_free": True}, "all attention"),
        ({"is_mm_prefix_lm": True}, "causal"),
        ({"rswa_window": 4}, "windows"),
        ({"fully_sharded_loras": True}, "--fully-sharded-loras"),
        ({"cache_dtype": "turboquant_k8v4"}, "--kv-cache-dtype"),
        ({"architectures": ["Gemma4ForConditionalGeneration"]}, "another base model"),
    ],
)
def test_refused_with_a_remedy(change: dict[str, Any], remedy: str) -> None:
    assert remedy in limits.refusal(config(**change))


def test_stock_operators_on_a_cpu_would_write_adapters_into_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lora_rows.SWITCH_VARIABLE, "0")
    assert "unset ICARUS_CPU_LORA" in limits.refusal(config())
    assert limits.refusal(config(device_type="cuda")) == ""
    monkeypatch.setenv(lora_rows.SWITCH_VARIABLE, "off")
    with pytest.raises(InputError, match="must be 1"):
        limits.refusal(config())


def test_buffers_without_room_are_refused() -> None:
    assert "start it again" in limits.room_refusal(scheduler(8, 64))
    assert limits.room_refusal(scheduler(8, 64, active=8)) == ""


def test_rocm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.torch.version, "hip", "6.4")
    assert "ROCm" in limits.refusal(config())


def test_caches() -> None:
    full, window, state = (type(name, (), {})() for name in ("FullAttentionSpec", "SlidingWindowSpec", "MambaSpec"))
    assert limits.cache_refusal([full, window]) == ""
    assert "MambaSpec" in limits.cache_refusal([full, state])
    several = type("UniformTypeKVCacheSpecs", (), {"kv_cache_specs": {"a": full, "b": state}})()
    assert "MambaSpec" in limits.cache_refusal([several])
    several.kv_cache_specs = {"a": full}
    assert limits.cache_refusal([several]) == ""


@pytest.mark.parametrize(
    ("active", "ceiling", "wanted"),
    [
        (128, 512, None),  # vLLM's own ceiling covers them
        (256, 512, None),
        (300, 512, 600),
        (1024, 512, 1024),  # as many requests as without decoder rows
        (300, 1024, None),
        (600, 1024, 1200),
    ],
)
def test_graphs_cover_both_rows_of_a_decode(active: int, ceiling: int, wanted: int | None) -> None:
    compilation = SimpleNamespace(max_cudagraph_capture_size=None, cudagraph_capture_sizes=None)
    for _ in range(2):
        limits.cover_graphs(compilation, active, ceiling)
        assert compilation.max_cudagraph_capture_size == wanted


@pytest.mark.parametrize("given", [{"max_cudagraph_capture_size": 64}, {"cudagraph_capture_sizes": [1, 64]}])
def test_graphs_are_as_the_user_set_them(given: dict[str, Any]) -> None:
    compilation = SimpleNamespace(**{"max_cudagraph_capture_size": None, "cudagraph_capture_sizes": None, **given})
    before = dict(vars(compilation))
    limits.cover_graphs(compilation, 1000, 512)
    assert vars(compilation) == before
