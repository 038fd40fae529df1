"""Further query heads of a decoder: one beside each group that reads the same K/V. They have no cache of their own.

    q' = B A x          of one head for each K/V head, d wide, rotated as the model's own are
    o' = B' A' attention(q', K, V)

is added to what the attention gives; B' is zero at first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class QueryHeads(nn.Module):
    """Those of one layer's attention."""

    def __init__(self, attention: Any, rank: int) -> None:
        super().__init__()
        config = attention.config
        self.kv_heads, self.head_size = config.num_key_value_heads, attention.head_dim
        self.groups = attention.num_key_value_groups
        width, heads = attention.q_proj.in_features, self.kv_heads * self.head_size
        self.query = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, heads, bias=False))
        up = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(up.weight)
        self.output = nn.Sequential(nn.Linear(heads, rank, bias=False), up)
        self._read: Tensor | None = None

    @contextmanager
    def added(self, attention: Any) -> Iterator[None]:
        """While the decoder runs: one more query head in each group."""
        handles = [
            attention.q_proj.register_forward_hook(self._more_queries),
            attention.o_proj.register_forward_pre_hook(self._take_out),
            attention.o_proj.register_forward_hook(self._add),
        ]
        attention.num_key_value_groups = self.groups + 1
        try:
            yield
        finally:
            attention.num_key_value_groups = self.groups
            for handle in handles:
                handle.remove()

    def _more_queries(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        own, more = self._grouped(output, self.groups), self._grouped(self.query(args[0].float()), 1)
        return torch.cat([own, more.to(output.dtype)], dim=-2).flatten(-3)

    def _take_out(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        heads = self._grouped(args[0], self.groups + 1)
        self._read = heads[..., self.groups, :].flatten(-2)
        return (heads[..., : self.groups, :].flatten(-3),)

    def _grouped(self, heads: Tensor, groups: int) -> Tensor:
        """(B, R, H d) as (B, R, heads of K/V, groups, d)."""
        return heads.view(*heads.shape[:2], self.kv_heads, groups, self.head_size)

    def _add(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert self._read is not None
        more: Tensor = 2.0 * self.output(self._read.float())  # alpha is twice the rank, as LoRA here has it
        return output + more.to(output.dtype)
