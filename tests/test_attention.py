"""Attention without copies: that it is used, and what becomes of models that cannot have it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from icarus import attention
from icarus.streams import IGNORED, Batch, EncoderCache, TwoStreams
from tiny_models import tiny, tokens, with_adapters

_OWN = {
    "falcon": {"alibi": False, "multi_query": True, "num_key_value_heads": None, "head_dim": None},
    "doge": {},  # makes a mask of V before attention
    "afmoe": {"num_dense_layers": 3, "sliding_window": 6, "layer_types": ["sliding_attention"] * 3},
}
"""Models that meet K and V in a way of their own; the last one names the arguments of its attention."""
_EXACT = {"rtol": 1e-3, "atol": 1e-4}


def _streams(family: str, **config: Any) -> TwoStreams:
    targets = ["dense_h_to_4h", "dense_4h_to_h"] if family == "falcon" else ["q_proj", "o_proj"]
    return TwoStreams(with_adapters(tiny(family, **config), ["one"], target_modules=targets))


def _assert_batch_equals_two_passes(streams: TwoStreams) -> None:
    padding = torch.tensor([0, 2, 5])
    pair, apart = EncoderCache(padding), EncoderCache(padding)
    for cache in (pair, apart):
        streams.encode(tokens(3, 12), cache)
    for token in tokens(3, 2, seed=3).T[..., None]:
        got = streams.step(token, pair, "one")
        want = streams.step(token, apart, "one", parallel=False)
        torch.testing.assert_close(got, want, **_EXACT)
        assert not torch.allclose(*want, atol=0.05)
    assert pair.length == apart.length == 14


def test_a_step_of_several_sequences_reads_k_and_v_once(monkeypatch: pytest.MonkeyPatch) -> None:
    streams, shapes = _streams("llama"), []
    _assert_batch_equals_two_passes(streams)
    own = torch.nn.functional.scaled_dot_product_attention

    def watched(query: Any, key: Any, *others: Any, **more: Any) -> Any:
        shapes.append((query.shape[:3], key.shape[:2]))
        return own(query, key, *others, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    streams.encode(tokens(3, 12), cache := EncoderCache())
    shapes.clear()
    streams.step(tokens(3, 1), cache, "one")
    assert set(shapes) == {((3, 2, 4), (3, 2))}, "two rows of two query heads for each of two K/V heads"


@pytest.mark.parametrize("family", _OWN)
def test_models_with_ways_of_their_own_step_in_batches_all_the_same(family: str) -> None:
    _assert_batch_equals_two_passes(_streams(family, **_OWN[family]))


def test_an_error_that_is_not_of_attention_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = _streams("llama")
    streams.encode(tokens(3, 12), cache := EncoderCache())

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(streams.model.get_base_model().model.layers[1].mlp, "forward", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        streams.step(tokens(3, 1), cache, "one")
    assert cache.length == 12
    assert streams.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("rows", "dtype"), [(0, torch.bfloat16), (256, torch.float32)], ids=["bfloat16", "float32"])
def test_attention_in_either_dtype_trains_bfloat16_alike(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_FEW_ROWS", rows)
    own, met = torch.nn.functional.scaled_dot_product_attention, set()

    def watched(query: Any, *others: Any, **more: Any) -> Any:
        met.add(query.dtype if query.requires_grad else None)
        return own(query, *others, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    ids = tokens(2, 20)
    labels = torch.full_like(ids, IGNORED)
    labels[:, -5:] = ids[:, -5:]

    def gradients(dtype: torch.dtype) -> torch.Tensor:
        model = with_adapters(tiny("llama", dtype=dtype), ["one"])
        TwoStreams(model).loss(Batch.of(ids, labels))[0].backward()
        return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])

    want = gradients(torch.float32)
    met.clear()
    assert (gradients(torch.bfloat16) - want).norm() < 0.05 * want.norm()
    assert met - {None} == {dtype}, "that in which decoder rows attend"
