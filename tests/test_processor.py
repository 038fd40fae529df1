"""The dtype follows the processor and the memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from icarus import processor

AVX2 = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu sse2 avx avx2 fma\nbugs\t\t: spectre_v1 bf16\n"


def cpu(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str, free: float = 16e9) -> None:
    (folder / "cpuinfo").write_text(text)
    monkeypatch.setattr(processor, "_CPUINFO", folder / "cpuinfo")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))


@pytest.mark.parametrize(
    ("text", "slow"),
    [
        (AVX2, True),
        (AVX2.replace("fma", "fma avx512f avx512_vnni"), True),
        (AVX2.replace("fma", "fma avx512_bf16"), False),
        (AVX2.replace("fma", "fma amx_tile amx_bf16"), False),
        ("Features\t: fp asimd bf16\n", False),
        ("Features\t: fp asimd\n", True),
        ("Hardware\t: something else\n", False),
    ],
)
def test_by_the_flags_of_the_processor(text: str, slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(monkeypatch, tmp_path, text)
    assert processor.slow_in_bfloat16() is slow
    assert processor.choose(10**9).dtype == ("float32" if slow else "bfloat16")


def test_float32_has_to_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(monkeypatch, tmp_path, AVX2, free=16e9)
    assert processor.choose(2 * 10**9).dtype == "float32"
    choice = processor.choose(8 * 10**9)
    assert choice.dtype == "bfloat16"
    assert "32.0 GB and would not fit" in choice.reason


def test_where_nobody_can_tell_it_is_not_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "none")
    assert not processor.slow_in_bfloat16()
