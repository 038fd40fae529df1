"""Names that an adapter must not have, because vLLM would take it for something else.

A request for the base model whose messages have parts is answered by the adapter that is named like the type of a
part, up to its first underscore (``_get_active_default_mm_loras`` in vllm/entrypoints/serve/engine/serving.py):
``text`` for ``{"type": "text", ...}``. That is meant for ``--default-mm-loras`` alone, and vLLM does not ask where a
name comes from.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import get_args

from icarus.errors import InputError


def check_name(name: str, modalities: Collection[str] = ()) -> None:
    """Refuse the name of an adapter that would answer for others.

    Args:
        name: as clients write it in ``model``.
        modalities: names that the user gave adapters for, by ``--default-mm-loras``.

    Raises:
        InputError: vLLM has a meaning for the name.
    """
    if name in part_types() and name not in modalities:
        raise InputError(
            f"An adapter cannot be named {name!r}: it would answer requests for the base model whose messages have "
            "such parts; choose another name."
        )


@cache
def part_types() -> frozenset[str]:
    """Types of the parts of a message, as vLLM lists them, and what it compares with names."""
    parsed, modalities = vllm_types()
    types = {*parsed, *modalities}
    return frozenset(types | {kind.split("_")[0] for kind in types})


def vllm_types() -> tuple[Collection[str], Collection[str]]:
    """Types of parts that vLLM parses, and the names that it has for modalities."""
    try:
        from vllm.renderers.chat_utils.chat_message import MM_PARSER_MAP
        from vllm.renderers.chat_utils.types import ModalityStr
    except ImportError:  # before 0.33
        try:
            from vllm.renderers.chat_utils import MM_PARSER_MAP, ModalityStr
        except ImportError:  # before 0.32
            from vllm.entrypoints.chat_utils import MM_PARSER_MAP, ModalityStr
    return MM_PARSER_MAP, get_args(ModalityStr)
