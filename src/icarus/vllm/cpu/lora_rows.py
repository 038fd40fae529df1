"""Gives torch the operator of lora_rows.cpp, which takes a step as runs of rows; no vLLM: cpu_lora.py connects them.

The operator is compiled on first use, for the vector instructions of this machine, and kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import subprocess
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

logger = logging.getLogger("vllm.icarus.lora_rows")  # below vLLM's own logger, so that it prints like one

SWITCH_VARIABLE = "ICARUS_CPU_LORA"

SOURCE = Path(__file__).with_suffix(".cpp")

_VECTOR_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}
"""By what torch finds the processor capable of; others (NEON) need no flag."""


def wanted() -> bool:
    """Whether the environment asks for this operator; it is on unless switched off. Raises InputError."""
    value = os.environ.get(SWITCH_VARIABLE, "1")
    if value not in ("0", "1"):
        raise InputError(f"{SWITCH_VARIABLE}={value!r} must be 1 (ICaRus's LoRA operator on CPUs) or 0 (vLLM's own).")
    return value == "1"


@cache
def available() -> bool:
    """Whether the operator could be loaded, which compiles it the first time; if not, the log says why."""
    try:
        load()
    except (OSError, RuntimeError) as error:
        logger.warning(
            "ICaRus's LoRA operator for CPUs cannot be used (%s); it needs a C++ compiler, g++ or what CXX names, and "
            "a cache folder to write to, ~/.cache/icarus or what ICARUS_HOME names. vLLM's own operators stay.",
            error,
        )
        return False
    return True


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

    Raises OSError or RuntimeError with the reason if the operator cannot be compiled.
    """
    library = _library()
    if not library.exists():
        _compile(library)
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError:  # made on another system that has the same cache folder
        _compile(library)
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]


def _compile(library: Path) -> None:
    """Workers that compile at once do so in a folder each, and one of the equal results stays.

    Not by torch.utils.cpp_extension.load: it wants ninja on PATH, and waits for ever for the lock that a build leaves
    when it is killed. OpenMP is not linked, so that it is the one that torch has loaded.
    """
    compiler = shlex.split(cpp_extension.get_cxx_compiler())  # type: ignore[no-untyped-call]
    headers = [f"-I{path}" for path in cpp_extension.include_paths()]
    torch_libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch"]
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiled, linked = str(Path(folder) / "rows.o"), str(Path(folder) / library.name)
        _run([*compiler, *_flags(), *headers, "-c", str(SOURCE), "-o", compiled])
        _run([*compiler, "-shared", compiled, "-o", linked, *torch_libraries])
        os.replace(linked, library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")


def _flags() -> list[str]:
    vectors = _VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ())
    return ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fno-math-errno", *vectors]


def _library() -> Path:
    made_of = "\n".join((SOURCE.read_text(), torch.__version__, platform.machine(), *platform.libc_ver(), *_flags()))
    return cache_directory() / "operators" / f"lora-rows-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
