"""Where rotary positions change with the length of the text, a KV cache ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import GenerationConfig

from icarus import model_length
from icarus.context import Specialists
from icarus.errors import UnsupportedModelError
from icarus.evaluate.sides import Sides
from icarus.streams import Batch, EncoderCache, TwoStreams
from icarus.train import IcarusSFTTrainer
from icarus.train.config import IcarusSFTConfig
from tiny_models import tiny, tiny_tokenizer, tokens, with_adapters

LIMIT = 12
CHANGING: dict[str, dict[str, Any]] = {
    "llama": {
        "max_position_embeddings": LIMIT,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    },
    "phi3": {
        "max_position_embeddings": 4 * LIMIT,
        "original_max_position_embeddings": LIMIT,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": LIMIT,
            "short_factor": [1.0] * 8,
            "long_factor": [3.0] * 8,
        },
    },
}


def keys(streams: TwoStreams, ids: torch.Tensor, *, first: int) -> torch.Tensor:
    """Of the first tokens' last layer, written by a pass over them, and then one over the rest."""
    cache = EncoderCache()
    for part in (ids[:, :first], ids[:, first:]):
        streams.encode(part, cache)
    return cache.layer(cache.layers - 1)[0][:, :, :first]


@pytest.mark.parametrize("family", CHANGING)
def test_a_text_is_refused_where_its_cache_would_not_fit(family: str) -> None:
    streams = TwoStreams(with_adapters(tiny(family, **CHANGING[family])))
    ids, cache = tokens(1, LIMIT + 1), EncoderCache()
    streams.encode(ids[:, :LIMIT], cache)
    for write in (
        lambda: streams.encode(ids[:, LIMIT:], cache),
        lambda: streams.step(ids[:, LIMIT:], cache, "one"),
        lambda: streams.loss(Batch.of(ids, ids)),
    ):
        with pytest.raises(UnsupportedModelError, match=f"13 tokens, and {family} .* keep to 12 tokens"):
            write()
    assert cache.length == LIMIT
    packed = torch.arange(LIMIT)[None].repeat(1, 2)
    streams.loss(Batch.of(tokens(1, 2 * LIMIT), tokens(1, 2 * LIMIT), position_ids=packed))  # two short documents


@pytest.mark.parametrize("family", CHANGING)
def test_without_that_refusal_a_cache_is_not_what_a_longer_pass_writes(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_length, "steady_length", lambda config: None)
    streams = TwoStreams(with_adapters(tiny(family, **CHANGING[family])))
    ids = tokens(1, LIMIT + 4)
    before, whole = keys(streams, ids, first=LIMIT), EncoderCache()
    streams.encode(ids, whole)
    assert not torch.allclose(before, whole.layer(whole.layers - 1)[0][:, :, :LIMIT], atol=1e-3)


@pytest.mark.parametrize("family", CHANGING)
def test_answers_end_there(family: str) -> None:
    model, tokenizer = tiny(family, **CHANGING[family]), tiny_tokenizer()
    with Sides(model, tokenizer).side("base") as side:
        assert side.max_length == LIMIT
        (answer,) = side.generate([tokens(LIMIT - 2).tolist()], max_new_tokens=9)
    assert len(answer.token_ids) <= 2
    context = Specialists(with_adapters(model), tokenizer).context()
    context.append(tokens(LIMIT - 2).tolist())
    context.generate("one", max_new_tokens=9)
    assert len(context.token_ids) <= LIMIT
    for config in (GenerationConfig(max_length=3 * LIMIT), GenerationConfig()):
        other = context.rollback(LIMIT - 2).fork()
        other.generate("one", generation_config=config)
        assert len(other.token_ids) <= LIMIT


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_other_models_end_at_their_last_position(family: str) -> None:
    config = tiny(family).config
    assert model_length.steady_length(config) is None
    assert model_length.max_length(config) == config.max_position_embeddings


@pytest.mark.parametrize("family", CHANGING)
def test_rows_that_are_too_long_are_refused_before_training(family: str, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": "a" * n, "completion": "b"} for n in (3, LIMIT)])
    args = IcarusSFTConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(UnsupportedModelError, match=r"keep to 12 tokens \(in training: max_length\)"):
        IcarusSFTTrainer(tiny(family, **CHANGING[family]), args, train_dataset=rows, processing_class=tiny_tokenizer())
    args.max_length = LIMIT
    IcarusSFTTrainer(tiny(family, **CHANGING[family]), args, train_dataset=rows, processing_class=tiny_tokenizer())


def test_layers_of_several_kinds_have_a_rope_each() -> None:
    kinds = {"full_attention": CHANGING["llama"]["rope_parameters"], "sliding_attention": {"rope_type": "default"}}
    assert model_length.steady_length(SimpleNamespace(rope_parameters=kinds, max_position_embeddings=LIMIT)) == LIMIT


def test_dynamic_rope_changes_behind_the_last_position_alone() -> None:
    rope = CHANGING["llama"]["rope_parameters"] | {"original_max_position_embeddings": LIMIT}
    config = tiny("llama", max_position_embeddings=2 * LIMIT, rope_parameters=rope).config
    assert model_length.steady_length(config) == 2 * LIMIT
    assert model_length.max_length(object()) is None
