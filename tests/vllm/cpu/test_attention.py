"""A decode and its decoder row in one pass, against vLLM's kernel with a request for each."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from strict_skips import NO_CPU_VLLM, WITHOUT_VLLM

pytest.importorskip("vllm.config", reason=WITHOUT_VLLM)

import vllm
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadataBuilder, _get_attn_isa

from attention_steps import Step
from icarus.vllm import attended_step
from icarus.vllm.cpu import attention as cpu_attention

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason=NO_CPU_VLLM)

KV_HEADS, SIZE, BLOCK, BLOCKS = 2, 64, 32, 160

BUILD, FORWARD = CPUAttentionMetadataBuilder.build, CPUAttentionBackendImpl.forward
if hasattr(BUILD, "__wrapped__"):  # the plugin is loaded
    BUILD, FORWARD = BUILD.__wrapped__, FORWARD.__wrapped__


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "MIN_PAIRED_KEYS", 0)


class Layer:
    """One attention layer with a filled cache."""

    def __init__(self, dtype: torch.dtype, group: int = 3, **changes: Any) -> None:
        heads = group * KV_HEADS
        if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
            torch.cpu._init_amx()
        isa = _get_attn_isa(dtype, BLOCK, SIZE)
        self.impl = SimpleNamespace(
            num_heads=heads, num_kv_heads=KV_HEADS, head_size=SIZE, scale=SIZE**-0.5, alibi_slopes=None, sinks=None,
            sliding_window=-1, logits_soft_cap=0.0, kv_cache_dtype="auto", attn_type=AttentionType.DECODER,
            use_zentorch_sdpa=False,
        )  # fmt: skip
        vars(self.impl).update(changes)
        compilation = SimpleNamespace(static_forward_context={"layer": SimpleNamespace(impl=self.impl)})
        self.builder = SimpleNamespace(
            vllm_config=SimpleNamespace(compilation_config=compilation), layer_names=["layer"], num_heads=heads,
            num_kv_heads=KV_HEADS, head_dim=SIZE, dtype=dtype, window_size=self.impl.sliding_window, isa=isa,
            kv_cache_dtype="auto", block_size=BLOCK, is_cross_attention=False, is_encoder_only_attention=False,
        )  # fmt: skip
        self.scales = SimpleNamespace(isa=isa, _k_scale_float=1.0, _v_scale_float=1.0)
        self.cache = torch.zeros(BLOCKS, KV_HEADS, BLOCK, 2 * SIZE, dtype=dtype)
        keys, values = self.cache.view(BLOCKS, KV_HEADS, 2 * BLOCK, SIZE).chunk(2, dim=2)
        k, v = torch.randn(2, BLOCKS * BLOCK, KV_HEADS, SIZE).to(dtype)
        slots = torch.arange(BLOCKS * BLOCK)
        ops.cpu_attn_reshape_and_cache(k, v, keys, values, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto")

    def run(self, step: Step, query: torch.Tensor, *, paired: bool) -> torch.Tensor:
        build, forward = BUILD, FORWARD
        if paired:
            build, forward = cpu_attention.wrap_build(BUILD), cpu_attention.wrap_forward(FORWARD)
        with attended_step.step(step.rows):
            metadata = build(self.builder, 0, step.common)
        padded = query.new_zeros(len(query) + 2, query.stride(0)).as_strided(
            (len(query) + 2, *query.shape[1:]), query.stride()
        )
        padded[:-2] = query
        output = padded.new_full(padded.shape, torch.nan)
        forward(self.impl, self.scales, padded, padded, padded, self.cache, metadata, output)
        assert output[-2:].isnan().all(), "padding is not written"
        self.pairs = cpu_attention.PAIRS.get(metadata)
        return output[:-2]


def query_of(step: Step, dtype: torch.dtype, group: int = 3) -> torch.Tensor:
    return torch.randn(step.common.num_actual_tokens, group * KV_HEADS, SIZE).to(dtype)


DECODES = Step((1, 1, True), (1, 700, True), (1, 1200, True))
MIXED = Step((1, 900, True), (40, 333, True), (1, 64, False), (1, 65, True), (3, 3, False), (1, 31, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [DECODES, MIXED], ids=["decodes", "mixed"])
@pytest.mark.parametrize(
    "changes", [{"group": 1}, {"group": 4}, {"sliding_window": 99}, {"logits_soft_cap": 5.0}], ids=str
)
def test_pairs_are_what_two_requests_are(dtype: torch.dtype, step: Step, changes: dict[str, Any]) -> None:
    layer, query = Layer(dtype, **changes), query_of(step, dtype, changes.get("group", 3))
    wanted, got = (layer.run(step, query, paired=paired) for paired in (False, True))
    assert layer.pairs is not None
    assert len(layer.pairs.order) == 2 * 3 * KV_HEADS
    assert (layer.pairs.back is not None) is (step is DECODES)
    close = {"atol": 2e-3, "rtol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(got, wanted, **close)


@pytest.mark.parametrize("step", [DECODES, MIXED], ids=["decodes", "mixed"])
def test_queries_may_be_a_part_of_a_projection(step: Step) -> None:
    layer, query = Layer(torch.bfloat16), query_of(step, torch.bfloat16)
    projection = torch.cat([query, query[:, :KV_HEADS]], dim=1)
    part = projection[:, : query.shape[1]]
    assert not part.is_contiguous()
    assert torch.equal(layer.run(step, part, paired=True), layer.run(step, query, paired=True))


def test_pairs_have_no_mask_of_the_step() -> None:
    """A mask for each request (``causal`` as a tensor) is for all requests of the step, and there are fewer pairs."""
    step = Step((1, 700, True), (5, 40, False), (1, 900, True))
    kind = torch.bool if vllm.__version__.startswith("0.31.") else torch.int32
    step.common.causal = torch.tensor([1, 0, 1, 1, 1], dtype=kind)
    layer, query = Layer(torch.float32), query_of(step, torch.float32)
    wanted, got = (layer.run(step, query, paired=paired) for paired in (False, True))
    assert layer.pairs.metadata.dynamic_causal is None
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scheduled_row_has_the_bits_of_a_step_without_decoder_rows(dtype: torch.dtype) -> None:
    layer, lengths = Layer(dtype), (1, 700, 1200)
    query = query_of(DECODES, dtype)
    got = layer.run(DECODES, query, paired=True)
    plain = Step(*((1, length, False) for length in lengths))
    plain.common.block_table_tensor = DECODES.common.block_table_tensor[:3]
    assert torch.equal(got[:3], layer.run(plain, query[:3], paired=False))


@pytest.mark.parametrize("changes", [{"alibi_slopes": torch.ones(6)}, {"sinks": torch.ones(6)}, {"group": 16}], ids=str)
def test_heads_that_differ_or_are_too_many_stay_apart(changes: dict[str, Any]) -> None:
    """The kernel stops where it divides keys among threads and a head of the cache has more than 16 query heads."""
    dtype = torch.bfloat16 if "group" in changes else torch.float32
    layer, query = Layer(dtype, **changes), query_of(DECODES, dtype, changes.get("group", 3))
    wanted, got = (layer.run(DECODES, query, paired=paired) for paired in (False, True))
    assert layer.pairs is None
    assert torch.equal(got, wanted)


def test_short_contexts_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "MIN_PAIRED_KEYS", 1902)
    layer = Layer(torch.float32)
    layer.run(DECODES, query_of(DECODES, torch.float32), paired=True)
    assert layer.pairs is None


def test_keys_beyond_a_window_are_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "MIN_PAIRED_KEYS", 202)  # of 1, 700 and 1,200 keys 201 are within 100
    layer = Layer(torch.float32, sliding_window=100)
    layer.run(DECODES, query_of(DECODES, torch.float32), paired=True)
    assert layer.pairs is None


def test_requests_that_a_backend_counts_anew_stay_apart() -> None:
    """As ChunkedLocalAttentionBuilder does: a request becomes two, and numbers of those behind it are others'."""
    step = Step((2, 40, False), (1, 64, True), (1, 65, True))
    step.common.query_start_loc = torch.tensor([0, 1, 2, 3, 4, 5, 6], dtype=torch.int32)
    step.common.num_reqs = 6
    for name in ("seq_lens", "block_table_tensor"):
        values = getattr(step.common, name)
        setattr(step.common, name, torch.cat([values[:1], values]))
    layer = Layer(torch.float32)
    layer.run(step, query_of(step, torch.float32), paired=True)
    assert layer.pairs is None
