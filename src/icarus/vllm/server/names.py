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
    try:
        from vllm.renderers.chat_utils import MM_PARSER_MAP, ModalityStr
    except ImportError:  # vLLM 0.31.0
        from vllm.entrypoints.chat_utils import MM_PARSER_MAP, ModalityStr

    types = {*MM_PARSER_MAP, *get_args(ModalityStr)}
    return frozenset(types | {kind.split("_")[0] for kind in types})
