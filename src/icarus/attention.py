"""Attention on a CPU that copies neither K nor V, for two kinds of passes for which Transformers' sdpa copies both.

Both stand in Transformers' registry beside ``sdpa`` (transformers/integrations/sdpa_attention.py), which repeats K and
V for each query head, and are switched on around a pass. Shapes: B sequences, Q query heads, H heads of K and V, R
rows, T cached positions, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

GROUPED = "icarus_grouped"
"""Rows (B, Q, R, D) under a mask, in training."""
PAIRED = "icarus_paired"
"""Encoder and decoder rows (2B, Q, 1, D) of the same sequences, over K and V (B, H, T, D)."""

# Up to these sizes torch's backward pass takes longer in bfloat16 than in float32 (2.13, Xeon with AMX: docs/log.md),
# and copies in float32 take little memory.
_FEW_ROWS, _FEW_POSITIONS = 256, 2048

Attended = tuple[Tensor, None]


def replaceable(model: nn.Module) -> bool:
    """Whether all attention of a Transformers model goes through the registry: Falcon's, for one, does not."""
    check = getattr(type(model), "_can_set_attn_implementation", None)
    return check is not None and bool(check())


@contextmanager
def replaced(config: Any, name: str, *, on: bool) -> Iterator[bool]:
    """Attention of this name inside the block, if ``on`` and if it would have been sdpa; yields whether it is."""
    before = config._attn_implementation
    on = on and before == "sdpa"
    if on:
        config._attn_implementation = name
    try:
        yield on
    finally:
        config._attn_implementation = before


def _usual(*tensors: Any, **kw: Any) -> Attended:
    attended: Attended = ALL_ATTENTION_FUNCTIONS["sdpa"](*tensors, **kw)
    return attended


def _grouped(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kw: Any
) -> Attended:
    """Half the time of Transformers' sdpa. (On CUDA, fused kernels take no groups beside a mask.)"""
    if kw.get("position_bias") is not None or attention_mask is None:
        return _usual(module, query, key, value, attention_mask, **kw)
    dropout, scaling, dtype, mask = kw.get("dropout", 0.0), kw.get("scaling"), query.dtype, attention_mask
    if _faster_in_float32(query, key):
        query, key, value = query.float(), key.float(), value.float()
        mask = mask.float() if mask.dtype == dtype else mask
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.to(dtype).transpose(1, 2).contiguous(), None


def _faster_in_float32(query: Tensor, key: Tensor) -> bool:
    few = query.shape[2] <= _FEW_ROWS and key.shape[0] * key.shape[2] <= _FEW_POSITIONS
    return query.dtype == torch.bfloat16 and query.requires_grad and few and not torch.is_autocast_enabled("cpu")


def _paired(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kw: Any
) -> Attended:
    """Both rows of a sequence, of all query heads of a K/V head, as rows of that head: K and V are read once."""
    if kw.get("position_bias") is not None:
        key, value = (torch.cat([tensor, tensor]) for tensor in (key, value))
        return _usual(module, query, key, value, attention_mask, **kw)
    (sequences, heads), size = key.shape[:2], value.shape[-1]
    rows = query.view(2, sequences, heads, -1, query.shape[-1]).permute(1, 2, 0, 3, 4).flatten(2, 3)
    mask = None if attention_mask is None else attention_mask[:sequences]  # the same for both
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=kw.get("scaling"))
    return out.view(sequences, heads, 2, -1, size).permute(2, 0, 1, 3, 4).reshape(2 * sequences, 1, -1, size), None


for _name, _function in ((GROUPED, _grouped), (PAIRED, _paired)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)
