"""One way to spoil an adapter, and what is expected of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ICARUS, CONVENTIONAL = "icarus", "conventional"

Damage = Callable[[Path], object]


class Outcome(Enum):
    """What is to become of an adapter."""

    REFUSED = "refused"
    """With one sentence, before it is served."""
    SERVED = "served"
    """With finite output; ``icarus verify`` calls an ICaRus adapter sound."""
    CONVENTIONAL = "conventional"
    """Served with finite output from a cache of its own, and refused by ``icarus verify``: it lost its marker."""
    EITHER = "either"
    """Refused with a sentence or served with finite output."""
    HARMLESS = "harmless"
    """The same; or its own requests are refused: its numbers are finite, and what is computed with them is not."""


@dataclass(frozen=True)
class Case:
    """One way to spoil an adapter of one kind."""

    name: str
    damage: Damage
    expected: Outcome
    says: str = ""
    """A regular expression for the refusal; empty for any sentence."""
    whole: bool = True
    """Whether both files of an adapter are there, so that ``--adapter-dir`` looks at it."""
    kind: str = ICARUS

    def of(self, kind: str) -> Case:
        """The same done to an adapter of a kind."""
        return replace(self, name=f"{kind}: {self.name}", kind=kind)

    def make(self, sound: Path, folder: Path) -> Path:
        """The damaged adapter, as ``folder``."""
        shutil.copytree(sound, folder)
        self.damage(folder)
        return folder


def refused(name: str, damage: Damage, says: str = "") -> Case:
    """Expected to be refused, with a sentence that ``says`` matches."""
    return Case(name, damage, Outcome.REFUSED, says)


def served(name: str, damage: Damage) -> Case:
    """Expected to be served with finite output."""
    return Case(name, damage, Outcome.SERVED)


def either(name: str, damage: Damage) -> Case:
    """Right are both."""
    return Case(name, damage, Outcome.EITHER)


def harmless(name: str, damage: Damage) -> Case:
    """Right is whatever disturbs nobody else."""
    return Case(name, damage, Outcome.HARMLESS)


def on(file: str, damage: Damage) -> Damage:
    """The damage done to one file of an adapter."""
    return lambda folder: damage(folder / file)
