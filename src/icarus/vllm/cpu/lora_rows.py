"""Compiles the operator of lora_rows.cpp for torch. It takes a step as runs of rows; lora.py connects it with vLLM.

The operator is compiled on first use, for the vector instructions of this machine, and kept in the user's cache.
Nothing here imports vLLM.
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

from icarus.errors import InputError
from icarus.packaged_model import cache_directory

logger = logging.getLogger("vllm.icarus.lora_rows")  # below vLLM's own logger, so that it prints like one

SWITCH_VARIABLE = "ICARUS_CPU_LORA"
"""Environment variable: 1 or unset for the operator, 0 for vLLM's own."""

SOURCE = Path(__file__).with_suffix(".cpp")

_VECTOR_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}
"""Compiler flags by torch's name for what the processor can do; others (NEON) need none."""


def wanted() -> bool:
    """Whether the operator is switched on, as it is by default.

    Raises:
        InputError: the variable has another value.
    """
    value = os.environ.get(SWITCH_VARIABLE, "1")
    if value not in ("0", "1"):
        raise InputError(f"{SWITCH_VARIABLE}={value!r} must be 1 (ICaRus's LoRA operator on CPUs) or 0 (vLLM's own).")
    return value == "1"


@cache
def available() -> bool:
    """Whether the operator can be loaded, which compiles it the first time. If it cannot, the log says why, once."""
    try:
        load()
    except (OSError, RuntimeError) as error:
        logger.warning(
            "ICaRus's LoRA operator for CPUs is unavailable (%s), and vLLM's own operators stay; it needs a C++ "
            "compiler (g++, or the one that CXX names) and a writable cache folder (~/.cache/icarus, or ICARUS_HOME).",
            error,
        )
        return False
    return True


def no_runs(rows: int) -> Tensor:
    """Room for the runs of a step with up to ``rows`` rows.

    Returns:
        (1 + 3 rows,) int32: the number of runs, then each of them as ``find_runs`` writes it.
    """
    with torch.inference_mode(False):  # vLLM writes it within inference mode and outside
        return torch.zeros(1 + 3 * rows, dtype=torch.int32)


def find_runs(slots: Sequence[int], runs: Tensor) -> None:
    """Write the runs of rows with one adapter: first row, row behind the last one, slot.

    Runs of one slot become neighbours, so that its weights are read once.

    Args:
        slots: the slot of each row's adapter, or -1 for none.
        runs: what ``no_runs`` returned; written to.
    """
    spans, start = [], 0
    for row in range(1, len(slots) + 1):
        if row == len(slots) or slots[row] != slots[start]:
            if slots[start] >= 0:
                spans.append((start, row, slots[start]))
            start = row
    spans.sort(key=itemgetter(2))
    flat = [len(spans), *chain.from_iterable(spans)]
    runs[: len(flat)] = torch.tensor(flat, dtype=torch.int32)


@cache
def load() -> None:
    """Define ``torch.ops.icarus.add_lora``, ``set_weights`` and ``forget``. The first time takes about ten seconds.

    Raises:
        OSError: the compiler or the cache folder is unavailable.
        RuntimeError: the operator cannot be compiled.
    """
    library = _library()
    if not library.exists():
        _compile(library)
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError:  # compiled on another system that shares the cache folder
        _compile(library)
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]


def _compile(library: Path) -> None:
    """Compile in a folder of its own and move the result; of several workers' equal results, one stays.

    torch.utils.cpp_extension.load needs ninja on PATH, and waits forever for the lock of a build that was killed.
    OpenMP is not linked, so that torch's own is used.
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
    inputs = "\n".join((SOURCE.read_text(), torch.__version__, platform.machine(), *platform.libc_ver(), *_flags()))
    return cache_directory() / "operators" / f"lora-rows-{hashlib.sha256(inputs.encode()).hexdigest()[:16]}.so"
