"""Weights that vLLM would leave out, or that overflow, are refused. Needs vLLM, but starts no engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from icarus.errors import AdapterError
from strict_skips import WITHOUT_VLLM

pytest.importorskip("vllm.config", reason=WITHOUT_VLLM)

from icarus.vllm.worker import placement

LAYER = "model.layers.0.self_attn"


def manager(**fields: Any) -> Any:
    """Of a model with a fused projection, a single one, and experts that are one module."""
    names = (f"{LAYER}.qkv_proj", f"{LAYER}.o_proj", "model.layers.0.mlp.experts")
    modules = {name: SimpleNamespace(base_layer=SimpleNamespace(input_size=8)) for name in names}
    packed = {f"{LAYER}.qkv_proj": [f"{LAYER}.{part}_proj" for part in "qkv"]}
    return SimpleNamespace(
        **{"modules": modules, "packed_modules": packed, "_use_ep": False, "is_pooling_model": False} | fields
    )


def lora(module: str, width: int = 8, dtype: torch.dtype = torch.float32, scaling: float = 2.0) -> Any:
    a, b = torch.ones(2, width, dtype=dtype), torch.full((8, 2), 1000.0, dtype=dtype)
    return SimpleNamespace(loras={module: SimpleNamespace(lora_a=a, lora_b=b, scaling=scaling)})


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.distributed.get_pp_group", lambda: SimpleNamespace(world_size=1))


@pytest.mark.parametrize("module", [f"{LAYER}.q_proj", f"{LAYER}.o_proj", "model.layers.0.mlp.experts.base_layer"])
def test_what_a_module_asks_for_has_a_place(module: str) -> None:
    placement.check_placed(manager(), lora(module), "sql")


def test_what_none_asks_for_is_refused() -> None:
    stray = lora(f"language_model.{LAYER}.q_proj")
    with pytest.raises(AdapterError, match=r"'sql' has weights for language_model.*leave out"):
        placement.check_placed(manager(), stray, "sql")
    placement.check_placed(manager(_use_ep=True), stray, "sql")  # it may be on another rank
    placement.check_placed(manager(is_pooling_model=True), stray, "sql")


def test_on_a_rank_of_a_pipeline_modules_may_be_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.distributed.get_pp_group", lambda: SimpleNamespace(world_size=2))
    placement.check_placed(manager(), lora("model.layers.9.self_attn.q_proj"), "sql")


def test_another_width_is_refused() -> None:
    """vLLM would copy the smaller matrix into the larger one."""
    with pytest.raises(AdapterError, match="with 4 inputs and the base model has 8"):
        placement.check_placed(manager(), lora(f"{LAYER}.q_proj", width=4), "sql")


@pytest.mark.parametrize(("dtype", "scaling"), [(torch.float16, 100.0), (torch.float32, 1e38)])
def test_an_overflow_in_the_type_that_is_served_is_refused(dtype: torch.dtype, scaling: float) -> None:
    module = f"{LAYER}.q_proj"
    placement.check_placed(manager(), lora(module, dtype=dtype), "sql")
    with pytest.raises(AdapterError, match=f"not finite in {dtype} times its scale"):
        placement.check_placed(manager(), lora(module, dtype=dtype, scaling=scaling), "sql")
