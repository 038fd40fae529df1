"""The plan of a step and its index tensors, which steps share as long as they are laid out alike.

While a batch only decodes, one step is laid out like the next. What is compared are copies of all values that a plan is
made of, so it does not matter by what they may change: requests that come, end, are preempted or change places, or
adapters that get another id. Where two requests of one adapter change places, the plan is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from icarus.vllm import step_layout
from icarus.vllm.step_layout import Batch, DecoderRows, Ints


@dataclass(frozen=True)
class Planned:
    """The decoder rows of a step, and tensors by which buffers are indexed."""

    rows: DecoderRows
    scheduled: Ints  # ``starts`` of the scheduled requests
    room: int  # for requests in buffers
    device: Any

    @cached_property
    def lora_ids(self) -> tuple[int, ...]:
        """Of each row of the step, as vLLM maps them."""
        return tuple(self.rows.lora_ids.tolist())

    @cached_property
    def tails(self) -> tuple[Ints, Ints]:
        """Requests and rows from the first decoder request on (``step_layout.tails``)."""
        return step_layout.tails(self.rows, len(self.scheduled) - 1)

    @cached_property
    def requests(self) -> Tensor:
        """The first of the tails, on the device."""
        return self._on_device(self.tails[0])

    @cached_property
    def sources(self) -> Tensor:
        """The second of the tails, on the device."""
        return self._on_device(self.tails[1])

    @cached_property
    def predicting(self) -> Tensor:
        """``step_layout.predicting_rows``, on the device."""
        return self._on_device(step_layout.predicting_rows(self.rows))

    @cached_property
    def starts(self) -> Ints:
        """(room + 1,), of all requests of the step, as ``step_layout.extend_starts`` pads them."""
        starts = np.empty(self.room + 1, dtype=np.int32)
        starts[: len(self.scheduled)] = self.scheduled
        step_layout.extend_starts(starts, len(self.scheduled) - 1, self.rows)
        return starts

    @cached_property
    def starts_on_device(self) -> Tensor:
        """The same on the device."""
        tensor: Tensor = async_tensor_h2d(self.starts.copy(), device=self.device)
        return tensor

    def _on_device(self, values: Ints) -> Tensor:
        tensor: Tensor = async_tensor_h2d(values.astype(np.int64, copy=False), device=self.device)
        return tensor


@dataclass
class Planner:
    """Plans the steps of one model runner."""

    room: int  # for requests in buffers
    device: Any
    _last: tuple[Any, Planned] | None = field(default=None, init=False)

    def plan(self, batch: Batch) -> Planned:
        """The plan of a step: that of the last step, if it is laid out alike.

        Raises:
            ValueError: as ``step_layout.plan``.
        """
        # vLLM changes some of these arrays from step to step; bytes are what they are now.
        arrays = (batch.starts, batch.sampled, batch.lora_ids, batch.shares)
        key = (batch.behind, *(array.tobytes() for array in arrays))
        if self._last is None or self._last[0] != key:
            planned = Planned(step_layout.plan(batch), batch.starts.copy(), self.room, self.device)
            self._last = (key, planned)
        return self._last[1]
