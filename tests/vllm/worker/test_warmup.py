"""Warm-up with plain objects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from icarus.vllm.worker import warmup


@pytest.mark.parametrize(("active", "sampled"), [(None, 8), (4, 4), (8, 8), (20, 8)])
def test_the_sampler_is_warmed_up_for_requests_that_may_run(active: int | None, sampled: int) -> None:
    def original(runner: Any, hidden_states: torch.Tensor) -> int:
        return len(hidden_states)

    runner = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_active_seqs=active))
    assert warmup.wrap_dummy_sampler_run(original)(runner, torch.zeros(8, 3)) == sampled
