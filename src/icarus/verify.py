"""``icarus verify``: may this adapter share a KV cache; exit status 0 or 1."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from icarus import adapter, arguments, base_model
from icarus.errors import CheckFailed, InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``icarus verify``."""
    parser.add_argument("adapter", metavar="ADAPTER")
    parser.add_argument("--base", help="also check that it fits this base model")
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Print what the adapter is; returns the report.

    Raises:
        CheckFailed: the adapter must not share a cache; its problems are printed.
        InputError: there is no such folder, or the base model cannot be read.
    """
    directory = options.adapter
    if not Path(directory).is_dir():
        raise InputError(f"There is no folder {directory}; give the directory of an adapter.")
    base = base_model.folder(options.base) if options.base else None
    problems = adapter.problems(directory, base)
    report: dict[str, Any] = {"adapter": directory, "sound": not problems, "problems": problems}
    for problem in problems:
        print(f"{directory}: {problem}")
    if problems:
        raise CheckFailed(f"{directory} must not share a KV cache ({len(problems)} problem(s) above).", report)
    info = adapter.verify(directory, base)
    print(f"{directory}: sound; rank {info.rank} on {', '.join(info.targets)}, {info.bytes / 1e6:.1f} MB")
    print(f"base model {info.base_model}, fingerprint {info.base_fingerprint[:16]}")
    if base is None:
        print("not checked against its base model; give --base to do so")
    return {**report, "rank": info.rank, "targets": list(info.targets), "base_fingerprint": info.base_fingerprint}
