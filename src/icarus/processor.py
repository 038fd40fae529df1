"""Which of float32 and bfloat16 suits a machine that computes on its CPU.

bfloat16 halves the memory that is read. Where the processor has no instructions for it, each matrix is converted as it
is multiplied, and prompts take several times as long as in float32 (docs/serve.md has figures).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

_FAST = {"avx512_bf16", "amx_bf16", "bf16"}  # as Linux lists them; the last one on Arm
_CPUINFO = Path("/proc/cpuinfo")
_SHARE = 0.5  # of the memory that is free, for weights alone


@dataclass(frozen=True)
class Choice:
    """A dtype, and why, as the rest of a sentence."""

    dtype: str
    reason: str


def choose(parameters: int) -> Choice:
    """The dtype for a model of this many parameters."""
    if not slow_in_bfloat16():
        return Choice("bfloat16", "for which this processor has instructions")
    why = "as this processor has neither AVX-512 BF16 nor AMX and is slow in bfloat16"
    size = 4 * parameters
    if size > _SHARE * psutil.virtual_memory().available:
        return Choice("bfloat16", f"{why}, but in float32 the weights are {size / 1e9:.1f} GB and would not fit")
    return Choice("float32", why)


def slow_in_bfloat16() -> bool:
    """Whether the processor is known to lack instructions for bfloat16. It is known on Linux alone."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = {flag for line in text.splitlines() if line.startswith(("flags", "Features")) for flag in line.split()}
    return bool(flags) and _FAST.isdisjoint(flags)
