"""Adapters in a worker, which reads copies of the files that the engine core verified.

Each ``wrap_`` function takes a method of vLLM and returns its replacement; see ledger.py.
"""

from __future__ import annotations

from functools import partial, wraps
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from vllm.lora.utils import get_adapter_absolute_path

from icarus import adapter
from icarus.errors import AdapterError
from icarus.vllm.marks import SharedLoRARequest
from icarus.vllm.patching import Original
from icarus.vllm.state import Attached
from icarus.vllm.worker.copies import Copies

_COPIES = Attached[Copies]("copies")
"""On a worker's LoRA manager."""


def stage(worker: Any, lora_request: SharedLoRARequest) -> str:
    """Copy an adapter; sent to all workers before any of them reads it, since one may fail to copy (copies.py).

    Returns:
        Why the adapter cannot be copied, or nothing. If this raised, the answers of the workers behind this one would
        stay in their queues and answer the next call (vllm/v1/executor/abstract.py:299).
    """
    version = lora_request.lora_int_id, lora_request.generation, lora_request.sha256
    try:
        worker.model_runner._ensure_lora_enabled()
        _copies(worker.model_runner.lora_manager).stage(*version, partial(_folder, lora_request))
    except Exception as error:  # of any kind: it is the answer
        return str(error) or type(error).__name__
    return ""


def unstage(worker: Any, lora_id: int) -> None:
    """Drop a staged copy; sent to all workers when one of them could not copy the adapter."""
    if manager := getattr(worker.model_runner, "lora_manager", None):
        _copies(manager).discard(lora_id)


def wrap_load_adapter(original: Original) -> Original:
    """``WorkerLoRAManager._load_adapter``: reads a copy of the files that the engine core verified."""

    @wraps(original)
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        locate = partial(_folder, lora_request)
        if not isinstance(lora_request, SharedLoRARequest):
            lora = original(self, lora_request)
            _check_conventional(locate())
            return lora
        copies, adapter_id = _copies(self), lora_request.lora_int_id
        with copies.reading(adapter_id, lora_request.generation, lora_request.sha256, locate) as folder:
            return original(self, replace(lora_request, lora_path=str(folder)))

    return _load_adapter


def wrap_remove_lora(original: Original) -> Original:
    """``remove_lora``: deletes the copy with the adapter."""

    @wraps(original)
    def remove_lora(self: Any, lora_id: int) -> Any:
        removed = original(self, lora_id)
        _copies(self.lora_manager).drop(lora_id)
        return removed

    return remove_lora


def _folder(lora_request: Any) -> Path:
    return Path(get_adapter_absolute_path(lora_request.lora_path))


def _copies(manager: Any) -> Copies:
    return _COPIES.get_or_make(manager, Copies)


def _check_conventional(folder: Path) -> None:
    """Raise AdapterError if a worker has just read an ICaRus adapter as a conventional one.

    The folder may have changed since the decision, for example while the adapter was evicted from memory.
    """
    if adapter.is_icarus(folder):
        raise AdapterError(f"{folder} became an ICaRus adapter after it was loaded as another; load it again.")
