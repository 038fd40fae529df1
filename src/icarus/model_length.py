"""How many positions a model has for K/V that are written once and read again and again."""

from __future__ import annotations

from typing import Any

from icarus.errors import UnsupportedModelError

_ORIGINAL = "original_max_position_embeddings"


def steady_length(config: Any) -> int | None:
    """The length up to which rotary frequencies stay as they are; None where they never change.

    Dynamic NTK and LongRoPE choose them by the length of the text (modeling_rope_utils.py, ``dynamic_rope_update``).
    Beyond, K/V that are in a cache are not those that a pass over the longer text would write.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # some models have one by layer type
    trained = getattr(config, "max_position_embeddings", None)
    changing = {"dynamic": lambda kind: trained, "longrope": lambda kind: kind.get(_ORIGINAL) or trained}
    limits = [changing[kind["rope_type"]](kind) for kind in kinds if kind.get("rope_type") in changing]
    return min((limit for limit in limits if limit), default=None)


def max_length(config: Any) -> int | None:
    """The longest text, in tokens; None where nothing says so."""
    limits = [getattr(config, "max_position_embeddings", None), steady_length(config)]
    return min((limit for limit in limits if limit), default=None)


def refuse_longer(length: int, limit: int, model_type: str) -> None:
    """Refuse a text of so many tokens.

    Raises:
        UnsupportedModelError: it is longer than ``limit``, which is what ``steady_length`` gives.
    """
    if length > limit:
        raise UnsupportedModelError(
            f"A text has {length} tokens, and {model_type} changes its rotary positions beyond {limit}, so that a KV "
            f"cache would not fit any longer; keep to {limit} tokens (in training: max_length)."
        )
