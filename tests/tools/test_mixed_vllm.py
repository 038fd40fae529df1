"""Python files of one version over compiled files of another."""

from __future__ import annotations

from importlib.metadata import distributions
from pathlib import Path

import pytest

from tools.mixed_vllm import mixed


def test_what_is_laid_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        "vllm-0.9.0/vllm/worker/runner.py": "new",
        "vllm-0.9.0/vllm/_C.abi3.so": "for GPUs",
        "site/vllm/_C.abi3.so": "for CPUs",
        "site/vllm/worker/runner.py": "old",
    }
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    for _ in range(2):
        folder = mixed("vllm-0.9.0", Path("site"))
        assert (folder / "vllm/worker/runner.py").read_text() == "new"
        assert (folder / "vllm/_C.abi3.so").read_text() == "for CPUs"
        assert [(found.name, found.version) for found in distributions(path=[str(folder)])] == [("vllm", "0.9.0+cpu")]
