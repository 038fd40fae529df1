"""What the installed vLLM can do and another tested version cannot."""

from __future__ import annotations


def reads_patterns() -> bool:
    """Whether it reads ``rank_pattern`` and ``alpha_pattern``: 0.32.0 does, 0.31.0 serves ``r`` and ``lora_alpha``."""
    from vllm.lora.peft_helper import PEFTHelper

    return "rank_pattern" in PEFTHelper.__dataclass_fields__
