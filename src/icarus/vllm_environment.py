"""Environment variables with which vLLM can serve ICaRus adapters, and starts fast."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

_FEW_CORES = 2  # measured; the scheduler busy-waits, so of more cores it would take its share, too


def variables(current: Mapping[str, str]) -> dict[str, str]:
    """What to set. Values in ``current`` stay as they are."""
    wanted = {}
    if not has_accelerator():
        # On CPUs, vLLM 0.32.0 saves the compiled model, cannot load it ("'function' object has no attribute
        # 'finalize_loading'"), and compiles again at every start. With 0, torch's own cache is used.
        wanted["VLLM_USE_AOT_COMPILE"] = "0"
        # vLLM keeps one core for its scheduler. Of two cores, that is half of the compute (docs/log.md has figures).
        if _cores() <= _FEW_CORES:
            wanted["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    return {name: current.get(name, value) for name, value in wanted.items()}


def has_accelerator() -> bool:
    """Whether torch is a build for GPUs.

    torch.cuda.is_available() would initialize the driver, which then could not be used after a fork.
    """
    return torch.version.cuda is not None or torch.version.hip is not None


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
