"""Further query heads of a decoder, by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from experiments.accuracy.query_heads import QueryHeads
from tiny_models import tiny


def test_they_add_nothing_at_first_and_then_what_the_formula_says() -> None:
    torch.manual_seed(0)
    model: Any = tiny()
    attention: Any = model.model.layers[0].self_attn
    size, kv_heads = attention.head_dim, model.config.num_key_value_heads
    x, steps = torch.randn(2, 6, model.config.hidden_size), torch.arange(6)[None]
    positions = model.model.rotary_emb(x, steps)
    mask = torch.full((6, 6), float("-inf")).triu(1)[None, None]
    heads = QueryHeads(attention, rank=5)

    def output() -> Tensor:
        attended: Tensor = attention(x, positions, mask)[0]
        return attended

    def split(rows: Tensor) -> Tensor:
        return rows.view(2, 6, kv_heads, size).transpose(1, 2)

    with torch.no_grad():
        plain = output()
        with heads.added(attention):
            torch.testing.assert_close(output(), plain, rtol=0, atol=1e-6)
            for parameter in heads.output.parameters():
                torch.nn.init.normal_(parameter)
            more = output()
        query, key = apply_rotary_pos_emb(split(heads.query(x)), split(attention.k_proj(x)), *positions)
        read = torch.softmax(query @ key.transpose(-1, -2) * size**-0.5 + mask, -1) @ split(attention.v_proj(x))
        by_hand = plain + 2 * heads.output(read.transpose(1, 2).flatten(2))
        torch.testing.assert_close(more, by_hand, rtol=1e-4, atol=1e-4)
        assert (more - plain).abs().max() > 0.1
        assert torch.equal(output(), plain), "outside the block the model is as it was"
