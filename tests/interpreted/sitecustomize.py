"""Lets vLLM's model runner V2 run on CPUs: Triton's interpreter runs its kernels, and vLLM wants an active backend.

On PYTHONPATH of engines that are tested with V2 (engines.py), as this must come before vLLM is imported.
"""

from typing import Any

import triton.backends
from triton.runtime.interpreter import InterpreterBuilder


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


class _Backend:
    driver = _Driver


triton.backends.backends["cpu"] = _Backend

_load = InterpreterBuilder.create_masked_load


def _load_with_any_mask(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
    """Triton 3.9.0's interpreter refuses masks of integers, which its compiler takes (vLLM's n-gram speculator)."""
    mask.data = mask.data.astype(bool)
    return _load(self, pointers, mask, *args)


InterpreterBuilder.create_masked_load = _load_with_any_mask
