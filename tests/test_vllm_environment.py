"""The variables that servers and benches start vLLM with."""

from __future__ import annotations

import os

import pytest
import torch

from icarus.vllm_environment import variables
from strict_skips import NO_CPU_TORCH


@pytest.mark.skipif(torch.version.cuda is not None, reason=NO_CPU_TORCH)
@pytest.mark.parametrize(("cores", "reserved"), [(1, "0"), (2, "0"), (3, None), (16, None)])
def test_of_few_cores_none_is_kept_from_computing(
    cores: int, reserved: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert variables({}).get("VLLM_CPU_NUM_OF_RESERVED_CPU") == reserved


def test_what_the_user_set_stays() -> None:
    chosen = variables({"VLLM_USE_AOT_COMPILE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "1", "HOME": "x"})
    assert chosen.get("VLLM_USE_AOT_COMPILE", "1") == "1"
    assert chosen.get("VLLM_CPU_NUM_OF_RESERVED_CPU", "1") == "1"
    assert "HOME" not in chosen
