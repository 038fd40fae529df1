"""A decode and its decoder row as one request with two queries, against a request for each.

vLLM's own metadata builders and ``forward`` run, with our changes and without. FlashAttention's kernel is replaced by
attention in plain torch. Triton's is run by its interpreter, which is switched on when Triton is imported, so in a
process of its own.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from strict_skips import WITHOUT_VLLM

pytest.importorskip("vllm.config", reason=WITHOUT_VLLM)

from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadataBuilder
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl, TritonAttentionMetadataBuilder

from attention_steps import Step
from engines import INTERPRETED
from icarus.vllm import attended_step
from icarus.vllm.gpu import attention
from icarus.vllm.settings import READ_KV_ONCE

KV_HEADS, SIZE, BLOCK, BLOCKS, ROOM = 2, 32, 16, 60, 14
FLASH, TRITON = "FlashAttention", "Triton"
KINDS: dict[str, tuple[Any, Any]] = {
    FLASH: (FlashAttentionMetadataBuilder, FlashAttentionImpl),
    TRITON: (TritonAttentionMetadataBuilder, TritonAttentionImpl),
}

STEPS = {
    "decodes": Step((1, 1, 1), (1, 40, 1), (1, 33, 0), (1, 64, 1), (1, 17, 0), blocks=BLOCKS),
    "specialists alone": Step((1, 100, 1), (1, 7, 1), blocks=BLOCKS),
    "a prompt of one token": Step((1, 1, 1), blocks=BLOCKS),
    "without specialists": Step((1, 30, 0), (1, 9, 0), blocks=BLOCKS),
    # A chunk of a long prompt, decodes of all kinds, the end of a specialist's prompt, a scored prompt, drafts.
    "mixed": Step((9, 40, 0), (1, 90, 1), (1, 20, 0), (5, 33, 1), (1, 64, 1), (4, 4, 4), (3, 50, 3), blocks=BLOCKS),
    "a prefill": Step((9, 40, 0), (5, 5, 1), blocks=BLOCKS),
}


class Layer:
    """One attention layer with a filled cache, its metadata builder, and vLLM's own code for both."""

    def __init__(
        self, backend: str, group: int = 3, *, graphs: bool = False, divide_keys: bool = True, **changes: Any
    ) -> None:
        torch.manual_seed(0)
        heads = group * KV_HEADS
        builder_class, impl_class = KINDS[backend]
        self.impl = impl_class.__new__(impl_class)
        vars(self.impl).update(
            num_heads=heads, num_kv_heads=KV_HEADS, head_size=SIZE, scale=SIZE**-0.5, alibi_slopes=None, sinks=None,
            sliding_window=(-1, -1), logits_soft_cap=0.0, kv_cache_dtype="auto", attn_type=AttentionType.DECODER,
            vllm_flash_attn_version=3, supports_quant_query_input=False, dcp_world_size=1, fa4_hd256=False,
            use_alibi_sqrt=False, chunk_lookback=-1, _kv_quant_mode=0, _is_per_token_head_quant=False, use_td=False,
            _set_kv_ptr_range=False,  # vLLM 0.33.0, for ROCm
        )  # fmt: skip
        vars(self.impl).update(changes)
        mode = CUDAGraphMode.FULL_AND_PIECEWISE if graphs else CUDAGraphMode.NONE
        compilation = SimpleNamespace(
            static_forward_context={"layer": SimpleNamespace(impl=self.impl)},
            cudagraph_mode=mode,
            max_cudagraph_capture_size=ROOM,
        )
        self.config = SimpleNamespace(
            additional_config={READ_KV_ONCE: True}, compilation_config=compilation, speculative_config=None,
            scheduler_config=SimpleNamespace(max_num_seqs=ROOM),
        )  # fmt: skip
        threshold, segments = ROOM if divide_keys else 0, 4
        self.builder = builder_class.__new__(builder_class)
        vars(self.builder).update(
            vllm_config=self.config, layer_names=["layer"], device=torch.device("cpu"), rswa_window=None,
            aot_schedule=False, aot_sliding_window=(-1, -1), use_full_cuda_graph=graphs, max_cudagraph_size=ROOM,
            max_num_splits=32, dcp_world_size=1, mm_prefix_query_ranges_np=None, seq_threshold_3D=threshold,
            num_par_softmax_segments=segments, max_seqs_64_segments=0,
            softmax_segm_output=torch.full((threshold, heads, segments, SIZE), torch.nan),
            softmax_segm_max=torch.full((threshold, heads, segments), torch.nan),
            softmax_segm_expsum=torch.full((threshold, heads, segments), torch.nan),
        )  # fmt: skip
        ones = torch.ones(1)
        self.scales = SimpleNamespace(_q_scale=ones, _k_scale=ones, _v_scale=ones)
        self.cache = torch.randn(BLOCKS, KV_HEADS, BLOCK, 2 * SIZE)
        self.build, self.forward = (getattr(f, "__wrapped__", f) for f in (builder_class.build, impl_class.forward))

    def metadata(self, step: Step, *, paired: bool, dummy: bool = False, prefix: int = 0) -> Any:
        build = attention.wrap_build(self.build) if paired else self.build
        with attended_step.step(None if dummy else step.rows):
            return build(self.builder, prefix, step.common)

    def attend(self, metadata: Any, query: Tensor) -> Tensor:
        """(rows, heads, size), with two rows of padding that stay as they are."""
        padded = torch.cat([query, query[:1], query[:1]])
        output = torch.full_like(padded, torch.nan)
        forward = attention.wrap_forward(self.forward)
        forward(self.impl, self.scales, padded, padded, padded, self.cache, metadata, output)
        assert output[-2:].isnan().all(), "padding is not written"
        return output[:-2]

    def both(self, step: Step) -> tuple[Tensor, Tensor, Any]:
        """Results with two requests and with one, and the metadata of the latter."""
        query = query_of(step, self.impl.num_heads)
        metadata = self.metadata(step, paired=True)
        return self.attend(self.metadata(step, paired=False), query), self.attend(metadata, query), metadata


def query_of(step: Step, heads: int) -> Tensor:
    return torch.randn(step.common.num_actual_tokens, heads, SIZE)


def padded(step: Step, requests: int) -> Step:
    """As for a CUDA graph, with as many rows as requests. Its buffers are larger than the step."""
    common, copied = step.common, Step.__new__(Step)
    more = requests - common.num_reqs
    starts = torch.cat([common.query_start_loc, common.query_start_loc[-1:].repeat(more)])
    copied.rows = step.rows
    copied.common = replace(
        common,
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=torch.cat([common.seq_lens, common.seq_lens.new_ones(more)]),
        block_table_tensor=torch.cat([common.block_table_tensor, common.block_table_tensor[:1].repeat(more, 1)]),
        num_reqs=requests,
        num_actual_tokens=requests,
    )
    return copied


class PlainAttention:
    """FlashAttention's interface for a paged cache, by its definition, in float64."""

    def __init__(self) -> None:
        self.lengths: list[list[int]] = []
        """Of the requests of each call."""

    def __call__(
        self, *, q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int,
        seqused_k: Tensor, max_seqlen_k: int, softmax_scale: float, causal: bool, window_size: list[int],
        block_table: Tensor, softcap: float, s_aux: Tensor | None, scheduler_metadata: Tensor | None, **others: Any,
    ) -> None:  # fmt: skip
        assert cu_seqlens_q.dtype == torch.int32
        assert type(causal) is bool, "FlashAttention 3 has one mask for all requests"
        lengths = cu_seqlens_q.diff().tolist()
        assert 0 <= min(lengths) <= max(lengths) <= max_seqlen_q
        assert cu_seqlens_q[0] == 0
        assert cu_seqlens_q[-1] <= len(q)
        assert int(seqused_k.max()) <= max_seqlen_k
        self.lengths.append(lengths)
        for request, (start, length) in enumerate(zip(cu_seqlens_q.tolist(), lengths, strict=False)):
            keys, values = (cache[block_table[request].long()].flatten(0, 1).double() for cache in (k, v))
            context = int(seqused_k[request])
            if not length:
                continue
            rows, position = torch.arange(start, start + length), torch.arange(context)
            at = (context - length + torch.arange(length))[:, None]
            seen = torch.ones(length, context, dtype=torch.bool)
            if causal:
                seen &= position <= at
            if window_size[0] >= 0:
                seen &= (position >= at - window_size[0]) & (position <= at + window_size[1])
            key, value = (part[:context].repeat_interleave(q.shape[1] // k.shape[2], dim=1) for part in (keys, values))
            scores = torch.einsum("rhd,khd->hrk", q[rows].double(), key) * softmax_scale
            scores = softcap * (scores / softcap).tanh() if softcap else scores
            weights = scores.masked_fill(~seen, -torch.inf).exp()
            total = weights.sum(2, keepdim=True) + (0 if s_aux is None else s_aux.double().exp()[:, None, None])
            out[rows] = torch.einsum("hrk,khd->rhd", weights / total, value).to(out.dtype)


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> PlainAttention:
    plain = PlainAttention()
    monkeypatch.setattr(flash_attn, "_FA4_DENSE_ATTENTION_KERNEL", plain)
    return plain


# ------------------------------------------------------------------------------------------------- what both must do


def check_steps(backend: str, group: int, names: Iterable[str] = STEPS, **changes: Any) -> None:
    for name in names:
        layer, step = Layer(backend, group, **changes), STEPS[name]
        wanted, got, metadata = layer.both(step)
        paired = attention.PAIRED.get(metadata)
        assert (paired is None) is (name in ("without specialists", "a prefill")), name
        torch.testing.assert_close(got, wanted, msg=lambda text, name=name: f"{name}: {text}")


def check_a_mask(backend: str) -> None:
    """With a causal mask the scheduled row of a pair would not see its own key."""
    layer, step = Layer(backend), STEPS["decodes"]
    query = query_of(step, layer.impl.num_heads)
    wanted = layer.attend(layer.metadata(step, paired=False), query)
    metadata = layer.metadata(step, paired=True)
    metadata.causal = True
    got = layer.attend(metadata, query)
    wrong = [row for row in range(len(got)) if not torch.allclose(got[row], wanted[row], rtol=1e-3, atol=1e-3)]
    assert wrong == [0, 1, 3], "scheduled rows of pairs"


def check_windows(backend: str) -> None:
    for step in (STEPS["decodes"], STEPS["mixed"]):
        layer = Layer(backend, sliding_window=(15, 0))
        layer.builder.aot_sliding_window = (15, 0)
        wanted, got, metadata = layer.both(step)
        assert attention.PAIRED.get(metadata) is None
        assert torch.equal(got, wanted)


def check_graphs(backend: str, *, divide_keys: bool) -> None:
    """What was built for a dummy step, which is what a graph reads, computes each later step of decodes."""
    layer = Layer(backend, graphs=True, divide_keys=divide_keys)
    requests = 9
    one = Step(*[(1, 1, 0)] * requests, blocks=BLOCKS)
    one.common.max_seq_len = 640  # a graph is captured for the longest
    captured = layer.metadata(one, paired=True, dummy=True)
    for name in ("decodes", "without specialists", "specialists alone"):
        step = padded(STEPS[name], requests)
        one.common.seq_lens.copy_(step.common.seq_lens)
        one.common.block_table_tensor.copy_(step.common.block_table_tensor)
        query = query_of(step, layer.impl.num_heads)
        layer.metadata(step, paired=True)
        got = layer.attend(captured, query)
        wanted = layer.attend(layer.metadata(step, paired=False), query)
        count = STEPS[name].common.num_actual_tokens
        torch.testing.assert_close(got[:count], wanted[:count])


# ------------------------------------------------------------------------------------------------- FlashAttention


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"logits_soft_cap": 5.0}, {"sinks": "one for each head"}], ids=str)
def test_flash_attention_of_pairs_is_what_two_requests_are(group: int, changes: dict[str, Any]) -> None:
    sinks = {"sinks": torch.randn(group * KV_HEADS)} if "sinks" in changes else {}
    check_steps(FLASH, group, **{**changes, **sinks})


def test_flash_attention_reads_each_request_once(kernel: PlainAttention) -> None:
    Layer(FLASH).both(STEPS["decodes"])
    assert kernel.lengths == [[1] * 8, [2, 2, 1, 2, 1, 0, 0, 0]]
    kernel.lengths.clear()
    Layer(FLASH).both(STEPS["mixed"])
    whole, others, pairs = kernel.lengths
    assert whole == [9, 1, 1, 5, 1, 4, 3, 1, 1, 1, 4, 3]
    assert others == [9, 0, 1, 5, 0, 4, 3, 0, 1, 0, 4, 3]
    assert pairs == [0, 2, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]


def test_flash_attention_has_no_causal_mask_for_pairs() -> None:
    check_a_mask(FLASH)


def test_flash_attention_keeps_two_requests_in_a_window() -> None:
    check_windows(FLASH)


def test_flash_attention_in_graphs() -> None:
    check_graphs(FLASH, divide_keys=True)


def test_rows_of_eight_bits_find_their_place() -> None:
    layer, step = Layer(FLASH), STEPS["mixed"]
    query = query_of(step, layer.impl.num_heads).to(torch.float8_e4m3fn)
    got = [layer.attend(layer.metadata(step, paired=paired), query) for paired in (False, True)]
    assert torch.equal(got[0].view(torch.uint8), got[1].view(torch.uint8))


def test_a_block_table_of_another_group_is_for_both_calls() -> None:
    """Model runner V1 copies a group's metadata for other groups of the same kind, and sets their block table."""
    layer, step = Layer(FLASH), STEPS["mixed"]
    query, other = query_of(step, layer.impl.num_heads), step.common.block_table_tensor.flip(1).contiguous()
    results = []
    for paired in (False, True):
        metadata = layer.metadata(step, paired=paired)
        results.append(layer.attend(layer.builder.update_block_table(metadata, other, step.common.slot_mapping), query))
    torch.testing.assert_close(*results)


# ------------------------------------------------------------------------------------------------- Triton


def run_interpreted() -> None:
    """All of the above with Triton's kernel."""
    check_steps(TRITON, 3)
    check_steps(TRITON, 4, divide_keys=False, logits_soft_cap=5.0)
    check_steps(
        TRITON, 16, ["decodes", "mixed"]
    )  # a program takes 16 heads, and so the two queries come to two programs
    check_steps(TRITON, 1, ["decodes", "mixed"], sinks=torch.randn(KV_HEADS))
    check_graphs(TRITON, divide_keys=True)
    check_graphs(TRITON, divide_keys=False)
    check_a_mask(TRITON)
    check_windows(TRITON)


def test_triton_attention_of_pairs_is_what_two_requests_are() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    paths = os.pathsep.join([str(INTERPRETED), *filter(None, sys.path)])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "VLLM_PLUGINS": "", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the kernel ran" in done.stdout


# ------------------------------------------------------------------------------------------------- whether


OBSTACLES: list[tuple[dict[str, Any], str]] = [
    ({"vllm_flash_attn_version": 2}, "FlashAttention 2 is not prepared"),
    ({"alibi_slopes": torch.ones(6)}, "rotary positions"),
    ({"sliding_window": (15, 0)}, "sliding windows"),
    ({"kv_cache_dtype": "int4_per_token_head"}, "--kv-cache-dtype"),
]


@pytest.mark.parametrize(("changes", "said"), OBSTACLES)
def test_what_cannot_be_paired_is_refused_with_the_reason(changes: dict[str, Any], said: str) -> None:
    assert said in refusal(Layer(FLASH, **changes))
    assert refusal(Layer(FLASH)) == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda layer: setattr(layer.config, "speculative_config", object()), "--speculative-config"),
        (
            lambda layer: setattr(layer.config.compilation_config, "cudagraph_mode", CUDAGraphMode.FULL),
            "FULL_AND_PIECEWISE",
        ),
        (lambda layer: setattr(layer.builder, "__class__", Other), "--attention-backend TRITON_ATTN"),
        (lambda layer: setattr(layer.impl, "__class__", OtherImpl), "--attention-backend TRITON_ATTN"),
    ],
)
def test_so_are_other_backends_drafts_and_graphs_of_prefills(change: Any, said: str) -> None:
    layer = Layer(FLASH)
    change(layer)
    assert said in refusal(layer)


def test_layers_that_can_be_paired_are_enough() -> None:
    groups = [[Layer(FLASH, sliding_window=(15, 0))], [Layer(FLASH)]]
    assert attention.refusal(runner_of(*itertools.chain(*groups))) == ""


def test_a_prefix_in_a_call_of_its_own_keeps_two_requests() -> None:
    """Cascade attention of vLLM 0.31.0, whose other call is causal."""
    assert attention.PAIRED.get(Layer(FLASH).metadata(STEPS["decodes"], paired=True, prefix=16)) is None


def test_without_the_setting_nothing_changes() -> None:
    layer, step = Layer(FLASH), STEPS["decodes"]
    layer.config.additional_config = {}
    assert attention.PAIRED.get(layer.metadata(step, paired=True)) is None


class Other(FlashAttentionMetadataBuilder):  # type: ignore[misc]
    """One that does more."""


class OtherImpl(FlashAttentionImpl):  # type: ignore[misc]
    """One that does more."""


def runner_of(*layers: Layer) -> Any:
    groups = [[SimpleNamespace(get_metadata_builder=lambda layer=layer: layer.builder)] for layer in layers]
    return SimpleNamespace(vllm_config=layers[0].config, attn_groups=groups)


def refusal(layer: Layer) -> str:
    reason = attention.refusal(runner_of(layer))
    assert not reason or reason.endswith(", or leave --read-kv-once out")
    return reason


if __name__ == "__main__":
    run_interpreted()
    print("the kernel ran")
