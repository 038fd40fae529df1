"""The same conversation again, the ICaRus way and the conventional way, for timing.

A recorded conversation is its tokens and who generated which of them. Both sides run the same tokens through the same
passes that generating them takes, without sampling:

    icarus         one cache; what nobody encoded yet is encoded, then one parallel step a token
    conventional   an ordinary LoRA and a cache for each model; each prefills what it has not seen, then steps
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from icarus.streams import EncoderCache, TwoStreams


@dataclass(frozen=True)
class Speech:
    """Positions ``start`` to ``end`` of the conversation, which one specialist generated."""

    model: str
    start: int
    end: int


@dataclass(frozen=True)
class Cost:
    """What a replay took: prompt tokens prefilled, and bytes of K/V held at its end."""

    prefilled_tokens: int
    kv_bytes: int


def icarus(streams: TwoStreams, tokens: Tensor, speeches: list[Speech]) -> Cost:
    """``tokens`` (1, T); the adapters are attached under the speakers' names."""
    cache, prefilled = EncoderCache(), 0
    for speech in speeches:
        if speech.start - 1 > cache.length:
            prefilled += speech.start - cache.length
            streams.encode(tokens[:, cache.length : speech.start - 1], cache)
        for position in range(speech.start - 1, speech.end - 1):
            streams.step(tokens[:, position : position + 1], cache, speech.model)
    return Cost(prefilled, cache.bytes)


@torch.no_grad()
def conventional(model: Any, tokens: Tensor, speeches: list[Speech]) -> Cost:
    """``tokens`` (1, T); ``model`` is a PEFT model with an ordinary LoRA for each speaker."""
    caches = {speech.model: DynamicCache() for speech in speeches}
    prefilled = 0
    for speech in speeches:
        cache = caches[speech.model]
        model.set_adapter(speech.model)
        seen = cache.get_seq_length()
        prefilled += speech.start - seen
        model(input_ids=tokens[:, seen : speech.start], past_key_values=cache, logits_to_keep=1)
        for position in range(speech.start, speech.end - 1):
            model(input_ids=tokens[:, position : position + 1], past_key_values=cache)
    layers: list[Any] = [layer for cache in caches.values() for layer in cache.layers]
    return Cost(prefilled, sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values)))
