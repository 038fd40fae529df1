"""Adapters in a worker, which reads copies of the files that the engine core verified.

Each ``wrap_`` function takes a method of vLLM and returns its replacement; see ledger.py.
"""

from __future__ import annotations

from functools import partial, wraps
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from vllm.lora.utils import get_adapter_absolute_path

from icarus.vllm.marks import VerifiedLoRARequest
from icarus.vllm.patching import Original
from icarus.vllm.state import Attached
from icarus.vllm.worker.copies import Copies
from icarus.vllm.worker.placement import check_placed

REFUSED = "Adapter refused: "
"""Before the reason why vLLM cannot serve an adapter; a server that cannot copy it is another matter."""

_COPIES = Attached[Copies]("copies")
"""On a worker's LoRA manager."""

_READ = Attached[tuple[Any, Any]]("read")
"""On a worker's LoRA manager: the version of an adapter that was staged, and what vLLM has read of it."""


def stage(worker: Any, lora_request: VerifiedLoRARequest) -> str:
    """Copy an adapter and read it; sent to all workers before any of them serves it, since one may fail (copies.py).

    Returns:
        Why the adapter cannot be served, or nothing. If this raised, the answers of the workers behind this one would
        stay in their queues and answer the next call (vllm/v1/executor/abstract.py:299).
    """
    try:
        worker.model_runner._ensure_lora_enabled()
        manager = worker.model_runner.lora_manager
        if not _copies(manager).stage(*_version(lora_request), partial(_folder, lora_request)):
            return ""
    except Exception as error:  # of any kind: it is the answer
        return str(error) or type(error).__name__
    try:
        with _copies(manager).staged(lora_request.lora_int_id) as folder:
            read = type(manager)._load_adapter.__wrapped__
            lora = _checked(manager, read(manager, replace(lora_request, lora_path=str(folder))), lora_request)
    except Exception as error:  # vLLM's own, or ours
        return REFUSED + (str(error) or type(error).__name__)
    _READ.set(manager, (_version(lora_request), lora))
    return ""


def unstage(worker: Any, lora_id: int) -> None:
    """Drop a staged copy; sent to all workers when one of them could not copy the adapter."""
    if manager := getattr(worker.model_runner, "lora_manager", None):
        _copies(manager).discard(lora_id)
        _READ.set(manager, None)


def wrap_load_adapter(original: Original) -> Original:
    """``WorkerLoRAManager._load_adapter``: reads a copy of the files that the engine core verified."""

    @wraps(original)
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        if not isinstance(lora_request, VerifiedLoRARequest):  # vLLM's own, for warm-up
            return original(self, lora_request)
        version = _version(lora_request)
        staged, lora = _READ.get(self) or (None, None)
        _READ.set(self, None)
        with _copies(self).reading(*version, partial(_folder, lora_request)) as folder:
            if staged == version:
                return lora
            return _checked(self, original(self, replace(lora_request, lora_path=str(folder))), lora_request)

    return _load_adapter


def _version(lora_request: VerifiedLoRARequest) -> tuple[int, int, str]:
    return lora_request.lora_int_id, lora_request.generation, lora_request.sha256


def _checked(manager: Any, lora: Any, lora_request: VerifiedLoRARequest) -> Any:
    """What was read, if vLLM makes use of all of it."""
    check_placed(manager._adapter_manager, lora, lora_request.lora_name)
    return lora


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
