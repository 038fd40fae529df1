"""Gives torch the operator of lora_rows.cpp, which takes a step as runs of rows; no vLLM: cpu_lora.py connects them.

The operator is compiled on first use, for the vector instructions of this machine, and kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from itertools import chain
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import cpp_extension

from icarus.base_model import cache_directory
from icarus.errors import InputError

SWITCH = "ICARUS_CPU_LORA"

SOURCE = Path(__file__).with_suffix(".cpp")

_VECTORS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}
"""By what torch finds the processor capable of; others (NEON) need no flag."""


def wanted() -> bool:
    """Whether the environment asks for this operator; it is on unless switched off. Raises InputError."""
    value = os.environ.get(SWITCH, "1")
    if value not in ("0", "1"):
        raise InputError(f"{SWITCH}={value!r} is neither 1 (ICaRus's LoRA operators on CPUs) nor 0 (vLLM's own).")
    return value == "1"


def available() -> bool:
    """Whether the operator is compiled, or can be."""
    compiler = shutil.which(cpp_extension.get_cxx_compiler())  # type: ignore[no-untyped-call]
    return _library().exists() or (compiler is not None and cpp_extension.is_ninja_available())


def no_runs(rows: int) -> Tensor:
    """Room for the runs of a step of up to ``rows`` rows: (1 + 3 rows,) int32, how many, then each as ``find_runs``."""
    with torch.inference_mode(False):  # in which vLLM makes and writes it now and then
        return torch.zeros(1 + 3 * rows, dtype=torch.int32)


def find_runs(slots: Sequence[int], runs: Tensor) -> None:
    """Write the runs of rows with one adapter: first row, row behind the last, slot.

    Args:
        slots: the slot of each row's adapter, -1 for none.
        runs: of ``no_runs``; runs of one slot become neighbours, so that its weights are read once.
    """
    found, start = [], 0
    for row in range(1, len(slots) + 1):
        if row == len(slots) or slots[row] != slots[start]:
            if slots[start] >= 0:
                found.append((start, row, slots[start]))
            start = row
    found.sort(key=itemgetter(2))
    flat = [len(found), *chain.from_iterable(found)]
    runs[: len(flat)] = torch.tensor(flat, dtype=torch.int32)


@cache
def load() -> None:
    """Define ``torch.ops.icarus.add_lora``, ``look`` and ``forget``; the first time takes some ten seconds.

    Workers that compile at once do so in a folder each, and one of the equal results stays. Raises RuntimeError with
    the compiler's words if it fails.
    """
    library = _library()
    if library.exists():
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        return
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        # Not in a folder that stays: torch waits for ever for the lock that a build leaves there when it is killed.
        built = cpp_extension.load(
            "lora_rows", str(SOURCE), extra_cflags=_flags(), build_directory=folder, is_python_module=False
        )
        os.replace(built, library)


def _flags() -> list[str]:
    return ["-O3", "-fopenmp", "-fno-math-errno", *_VECTORS.get(torch.backends.cpu.get_cpu_capability(), ())]


def _library() -> Path:
    made_of = "\n".join((SOURCE.read_text(), torch.__version__, *_flags()))
    return cache_directory() / "operators" / f"lora-rows-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
