"""ICaRus: many specialists, one KV cache (arXiv 2603.13281).

The names below are imported when first used, so that ``import icarus`` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from icarus import errors

if TYPE_CHECKING:
    from icarus.context import BASE, Context, Specialists, Turn
    from icarus.packaged_model import PACKAGED, PREPARED
    from icarus.shipped_specialists import shipped
    from icarus.streams import Batch, EncoderCache, TwoStreams

_HOMES = {
    "PACKAGED": "packaged_model",
    "PREPARED": "packaged_model",
    "BASE": "context",
    "Context": "context",
    "Specialists": "context",
    "Turn": "context",
    "shipped": "shipped_specialists",
    "Batch": "streams",
    "EncoderCache": "streams",
    "TwoStreams": "streams",
}

__all__ = [
    "BASE",
    "PACKAGED",
    "PREPARED",
    "Batch",
    "Context",
    "EncoderCache",
    "Specialists",
    "Turn",
    "TwoStreams",
    "errors",
    "shipped",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'icarus' has no attribute {name!r}")
    return getattr(import_module(f"icarus.{_HOMES[name]}"), name)
