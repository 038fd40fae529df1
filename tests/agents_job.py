"""The command with a fake server in place of vLLM: patches, and the command line in a process of its own.

python agents_job.py WORDS...    FAKE_DIES=conventional:5 makes that system's server end at its sixth call
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from icarus import cli
from icarus.bench.agents import sweep, systems

FAKE = Path(__file__).parent / "fake_server.py"


def command(kind: Any, settings: Any, base: Path, adapters: Path, port: int) -> list[str]:
    """As ``systems.command``; its adapters must be there."""
    words = [sys.executable, str(FAKE), "--port", str(port)]
    if folder := systems.ADAPTERS.get(kind.system):
        assert all((adapters / folder / name / "adapter_config.json").is_file() for name in kind.names)
    system, _, calls = os.environ.get("FAKE_DIES", "").partition(":")
    if system == kind.system:
        words += ["--dies-after", calls]
    return [*words, "--shared"] if kind.system in ("icarus", "base") else words


def install(patch: Any) -> None:
    """``patch(module, name, value)`` as monkeypatch.setattr has it."""
    patch(systems, "command", command)
    patch(sweep, "vllm_version", lambda: {"fake": "1"})


if __name__ == "__main__":
    install(setattr)
    sys.exit(cli.main(sys.argv[1:]))
