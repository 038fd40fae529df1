"""Whether a checkpoint is of the run that is to go on."""

from __future__ import annotations

import json
from pathlib import Path

from icarus import adapter
from icarus.errors import InputError
from icarus.train.config import AdapterConfig


def check_same(checkpoint: Path, config: AdapterConfig, base_fingerprint: str | None) -> None:
    """Refuse one of another kind, rank, alpha or base model, whose weights would get a config that is not theirs.

    Args:
        checkpoint: its folder.
        config: of the run that resumes.
        base_fingerprint: of its base model; None for a conventional adapter, which has none.

    Raises:
        InputError: naming what differs.
    """
    saved = json.loads((checkpoint / adapter.CONFIG_NAME).read_text(encoding="utf-8"))
    its_base = saved.get("icarus", {}).get("base_fingerprint")
    for name, was, now in (
        ("method", "icarus" if its_base else "lora", config.kind),
        ("rank", saved["r"], config.rank),
        ("alpha", saved["lora_alpha"], config.alpha or 2 * config.rank),
        ("a base model of fingerprint", its_base, base_fingerprint),
    ):
        if was != now:
            raise InputError(
                f"{checkpoint} is of a run with {name} {was}, and this one has {now}; give what it had, or remove "
                f"{checkpoint.parent} to start anew."
            )
