"""bfloat16 on a processor without instructions for it, at the speed of float32.

torch multiplies bfloat16 matrices there at an eighth of that speed. Products of bfloat16 values are exact in float32,
in which the instructions accumulate. So a float32 product of the same values, rounded at the end, is what a processor
with instructions computes, but for the order of the sum. Attention, too, is computed in float32 and rounded at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icarus import processor

_attention = F.scaled_dot_product_attention
_ROWS = 4  # for fewer, as in generation, converting K and V takes longer than attention


def speed_up() -> None:
    """Until the process ends; nothing where the processor has the instructions."""
    if processor.slow_in_bfloat16():
        nn.Linear.forward = _forward  # type: ignore[method-assign]
        F.scaled_dot_product_attention = _attend  # type: ignore[assignment]


def _forward(self: nn.Linear, input: Tensor) -> Tensor:
    if input.dtype != torch.bfloat16 or self.weight.dtype != torch.bfloat16:
        return F.linear(input, self.weight, self.bias)
    trained = torch.is_grad_enabled() and self.weight.requires_grad
    if trained or self.bias is not None:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.weight.float(), bias).bfloat16()
    product: Tensor = _Product.apply(input, _in_float32(self))
    return product


def _in_float32(module: nn.Linear) -> Tensor:
    """The weights of a layer that is not trained, converted once."""
    weight = module.weight
    version = (weight.data_ptr(), weight._version)
    made: tuple[Any, Tensor] | None = module.__dict__.get("_in_float32")
    if made is None or made[0] != version:
        made = version, _converted(weight)
        module.__dict__["_in_float32"] = made
    return made[1]


def _converted(weight: Tensor) -> Tensor:
    return weight.detach().float()


class _Product(torch.autograd.Function):
    """x W' with a fixed W in float32; x, the result and its gradient are in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return F.linear(x.float(), weight).bfloat16()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return (gradients[0].float() @ ctx.weight).bfloat16(), None


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    if query.dtype != torch.bfloat16 or query.shape[-2] < _ROWS:
        return _attention(query, key, value, attn_mask=attn_mask, **options)
    mask: Any = attn_mask.float() if attn_mask is not None and attn_mask.dtype == torch.bfloat16 else attn_mask
    return _attention(query.float(), key.float(), value.float(), attn_mask=mask, **options).bfloat16()
