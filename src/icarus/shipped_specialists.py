"""The specialists that this project ships: small adapters, with their figures.

They live in ``icarus/shipped/NAME``, each an adapter directory, and were trained by ``icarus train`` with the settings
in ``experiments/wikisql_roles/shipped.yaml``. Their base model is the packaged one, prepared for them: the adapter in
``icarus/shipped/encoder`` is merged into it on first use (packaged_model.py). ``icarus/shipped/figures.json`` holds
what they reached on unseen data.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from icarus import arguments

BASE_MODEL = "smollm2-135m-wikisql"
"""The name of the base model that they run on; see packaged_model.py."""

_SHIPPED = Path(__file__).parent / "shipped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``icarus specialists``."""
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """``icarus specialists``: print the shipped specialists as ``--adapter`` takes them."""
    folders = {name: str(folder) for name, folder in shipped().items()}
    print(f"Their base model: {BASE_MODEL}", file=sys.stderr)
    for name, folder in folders.items():
        print(f"{name}={folder}")
    return folders


def shipped() -> dict[str, Path]:
    """Name and folder of each shipped specialist, in the order in which they work together."""
    return {name: _SHIPPED / name for name in figures()}


def encoder() -> Path:
    """Folder of the conventional adapter that prepares their base model."""
    return _SHIPPED / "encoder"


def conversation() -> list[dict[str, Any]]:
    """The turns of ``icarus demo``: ``{"model", "messages", "reference"}`` each."""
    turns: list[dict[str, Any]] = json.loads((_SHIPPED / "demo.json").read_text(encoding="utf-8"))
    return turns


def figures() -> dict[str, Any]:
    """What each shipped specialist was trained on and scored: ``{name: {"task", "metric", "base", ...}}``."""
    specialists: dict[str, Any] = json.loads((_SHIPPED / "figures.json").read_text(encoding="utf-8"))
    return specialists
