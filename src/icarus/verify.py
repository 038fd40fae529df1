"""``icarus verify``: may this adapter share a KV cache; exit status 0 if so, 1 if not, 2 for bad input.

A conventional adapter may not, and may well be served: it says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from icarus import adapter, arguments, base_model
from icarus.errors import CheckFailed, InputError

_PATTERNS = "has {}, which vLLM serves from 0.32.0 on"
_UNCHECKED = "not checked against its base model; give --base to do so"


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
    if problems:
        if plain := adapter.is_conventional(directory):
            print(f"{directory}: {problems[0]}")
            report |= _served(directory, base)
        else:
            _print(directory, problems)
        count = 1 if plain else len(problems)
        above = "for the reason above" if count == 1 else f"for the {count} reasons above"
        mate = f" with {options.base}" if base and not plain else ""
        raise CheckFailed(f"{directory} must not share a KV cache{mate}, {above}.", report)
    info = adapter.verify(directory, base)
    print(f"{directory}: sound; rank {info.rank} on {', '.join(info.targets)}, {info.bytes / 1e6:.1f} MB")
    print(f"base model {info.base_model!r}, fingerprint {info.base_fingerprint[:12]}")
    if info.patterns:
        print(_PATTERNS.format(" and ".join(info.patterns)))
    if base is None:
        print(_UNCHECKED)
    return {**report, "rank": info.rank, "targets": list(info.targets), "base_fingerprint": info.base_fingerprint}


_SHOWN = 20  # of the reasons; the report has all


def _print(directory: str, problems: Sequence[str]) -> None:
    for problem in problems[:_SHOWN]:
        print(f"{directory}: {problem}")
    if len(problems) > _SHOWN:
        print(f"{directory}: {len(problems) - _SHOWN} more; --json writes all of them")


def _served(directory: str, base: Path | None) -> dict[str, Any]:
    """Say whether a conventional adapter can be served; returns what the report has of it."""
    problems = adapter.conventional_problems(directory, base)
    if problems:
        print(f"{directory}: a conventional adapter, which cannot be served either:")
        _print(directory, problems)
        return {"kind": "conventional", "served": False, "serving_problems": problems}
    info = adapter.verify_conventional(directory, base)
    size = f"rank {info.rank} on {', '.join(info.targets)}, {info.bytes / 1e6:.1f} MB"
    print(
        f"{directory}: a conventional adapter, {size}; it can be served, with a cache of its own, "
        "and icarus distill makes an ICaRus adapter of it"
    )
    if info.patterns:
        print(_PATTERNS.format(" and ".join(info.patterns)))
    if base is None:
        print(_UNCHECKED)
    return {"kind": "conventional", "served": True, "rank": info.rank, "targets": list(info.targets)}
