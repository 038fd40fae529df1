"""A plan and its index tensors are those of the last step exactly where the step is laid out like that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from strict_skips import WITHOUT_VLLM

pytest.importorskip("vllm.config", reason=WITHOUT_VLLM)

from icarus.vllm import step_layout
from icarus.vllm.step_layout import Batch
from icarus.vllm.worker.planned import Planned, Planner

ROOM = 8
# Decodes: of the base model, two of one adapter, and a conventional one.
STEP = Batch(np.arange(5), np.ones(4, dtype=np.int32), np.array([0, 1, 1, 2]), np.array([False, True, True, False]))


def planner() -> Planner:
    return Planner(ROOM, torch.device("cpu"))


def values(planned: Planned) -> list[Any]:
    tensors = planned.requests, planned.sources, planned.predicting, planned.starts_on_device
    return [planned.lora_ids, planned.starts.tolist(), *(tensor.tolist() for tensor in tensors)]


def test_steps_that_are_laid_out_alike_share_all() -> None:
    here = planner()
    first = here.plan(STEP)
    again = here.plan(replace(STEP, starts=STEP.starts.copy()))
    assert again is first
    assert again.sources is first.sources
    assert values(first) == [
        (0, 0, 0, 2, 1, 1), [0, 1, 2, 3, 4, 5, 6, 6, 6], [1, 2], [1, 2], [0, 4, 5, 3], [0, 1, 2, 3, 4, 5, 6, 6, 6]
    ]  # fmt: skip


def without(batch: Batch, request: int) -> Batch:
    """One that has finished, or was preempted."""
    kept = [values[np.arange(4) != request] for values in (batch.sampled, batch.lora_ids, batch.shares)]
    return Batch(np.arange(4), *kept)


def changed(name: str, index: int, value: Any) -> Batch:
    array = getattr(STEP, name).copy()
    array[index] = value
    return replace(STEP, **{name: array})


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(without(STEP, 1), id="a request has finished"),
        pytest.param(without(STEP, 0), id="another one has"),
        pytest.param(
            replace(STEP, lora_ids=STEP.lora_ids[[3, 1, 2, 0]], shares=STEP.shares[[3, 1, 2, 0]]), id="places change"
        ),
        pytest.param(changed("lora_ids", 2, 5), id="an adapter came back under another id"),
        pytest.param(changed("shares", 2, False), id="a conventional adapter has the place"),
        pytest.param(changed("sampled", 1, 0), id="a prompt in pieces has the place"),
        pytest.param(replace(STEP, starts=np.array([0, 1, 2, 3, 6])), id="a prompt has the place"),
        pytest.param(replace(STEP, behind=1), id="decoder requests stand elsewhere"),
    ],
)
def test_a_step_that_is_not_gets_a_plan_of_its_own(other: Batch) -> None:
    here = planner()
    here.plan(STEP)
    assert values(here.plan(other)) == values(planner().plan(other)) != values(planner().plan(STEP))
    assert values(here.plan(STEP)) == values(planner().plan(STEP)), "and back"


@pytest.mark.parametrize("name", ["starts", "sampled", "lora_ids", "shares"])
def test_arrays_that_vllm_writes_to_are_not_taken_for_those_of_the_last_step(name: str) -> None:
    """On V1 the ids of adapters are a view of a buffer."""
    here, mine = planner(), replace(STEP, **{name: getattr(STEP, name).copy()})
    before = values(here.plan(mine))
    array = getattr(mine, name)
    array[:] = {"starts": [0, 1, 2, 3, 6], "sampled": [1, 0, 1, 1], "lora_ids": [0, 1, 5, 2], "shares": [0, 1, 0, 0]}[
        name
    ]
    assert values(here.plan(mine)) == values(planner().plan(mine)) != before


def test_more_samples_than_rows_leave_no_plan_behind() -> None:
    here = planner()
    here.plan(STEP)
    for _ in range(2):
        with pytest.raises(ValueError, match="samples more rows"):
            here.plan(changed("sampled", 1, 2))
    assert here.plan(STEP).rows.requests.tolist() == step_layout.plan(STEP).requests.tolist()
