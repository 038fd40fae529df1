"""A conventional adapter merged into its base model: the same weights on every processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from icarus import adapter, base_model
from saved import save_base


def stored(weight: str, half: str) -> str:
    """The name of A or B in an adapter's file."""
    return f"base_model.model.{weight.removesuffix('.weight')}.lora_{half}.weight"


def test_sums_are_taken_in_float64_and_rounded_once(tmp_path: Path) -> None:
    def base() -> Any:
        return base_model.load(str(tmp_path / "base"), dtype="float32")[0]

    save_base(tmp_path / "base")
    torch.manual_seed(0)
    model: Any = adapter.attach_conventional(base(), name="default", rank=8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    model.save_pretrained(tmp_path / "lora")
    before, merged = base().state_dict(), adapter.merge(base(), tmp_path / "lora").state_dict()
    halves = load_file(tmp_path / "lora" / adapter.WEIGHTS_NAME)
    scale = model.peft_config["default"].lora_alpha / 8

    def summed(name: str, dtype: torch.dtype) -> torch.Tensor:
        a, b = (halves[stored(name, half)].to(dtype) for half in "AB")
        return (before[name].to(dtype) + scale * (b @ a)).float()

    changed = [name for name in before if stored(name, "A") in halves]
    assert changed
    assert before.keys() == merged.keys()
    for name, weight in before.items():
        assert torch.equal(merged[name], summed(name, torch.float64) if name in changed else weight), name
        assert merged[name].dtype == torch.float32
    short = [name for name in changed if not torch.equal(merged[name], summed(name, torch.float32))]
    assert short, "sums in float32 would do, and this test proves nothing"
