"""What is compared: base model, arms, tasks and the order in which cells are run, from a YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import yaml

from experiments.accuracy.data import SOURCES
from experiments.accuracy.data import Form as Template
from experiments.accuracy.forms import Form
from icarus.errors import InputError

Method = Literal["icarus", "lora", "distill"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to make a specialist."""

    method: Method
    rank: int
    base: Literal["base", "team", "together"] = "base"
    """``team`` and ``together``: the base model that was prepared for the team in one of two ways (bases.py)."""
    ranks: dict[str, int] | None = None
    """Of the projections with these names, in place of ``rank``."""
    form: Form | None = None
    """What else the decoder has (forms.py)."""
    form_rank: int | None = None
    """Of what the form adds; None: ``rank``."""
    teacher: str | None = None
    """The arm whose adapter of the same seed, at its best rate, is distilled."""
    lmbda: float | None = None
    """Of a distillation: the share of batches with answers that the student samples; None: the product's default."""
    rate: float | None = None
    """The learning rate, if it is known; None: it is searched."""
    rates_of: str | None = None
    """The arm whose best rate is taken; None: a search of its own."""
    time_of: str | None = None
    """The arm whose wall time is met by more steps; None: the steps of all."""

    @property
    def in_process(self) -> bool:
        """Whether only the experiment can run it, so that losses alone compare it with others."""
        return bool(self.form or self.ranks)


@dataclass(frozen=True, kw_only=True)
class Team:
    """The tasks that a base model is prepared for, and how long."""

    tasks: tuple[str, ...]
    steps: int
    rate: float
    rank: int = 16
    seed: int = 0


_NO_TEAM = Team(tasks=(), steps=0, rate=0.0)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The whole of one file; ``grid`` has pairs of tasks and arms."""

    name: str
    base: str
    form: Template
    dtype: Literal["float32", "bfloat16"]
    steps: int
    batch_size: int
    """Rows of a step."""
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    test_items: int
    batch_sizes: dict[str, int] = field(default_factory=dict)
    """Of tasks whose rows are long, in place of ``batch_size``."""
    scored_items: dict[str, int] = field(default_factory=dict)
    """Of tasks whose answers take long, in place of ``test_items``; the first ones of those."""
    validation_rows: dict[str, int] = field(default_factory=dict)
    """Of tasks whose rows are long, in place of all; the first ones of those."""
    scores: bool = True
    """Whether answers are scored, of the arms with which that is possible; else final validation losses compare all."""
    team: Team = _NO_TEAM
    arms: dict[str, Arm]
    grid: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]

    def rows_per_step(self, task: str) -> int:
        """The batch size of a task's runs."""
        return self.batch_sizes.get(task, self.batch_size)

    def curves(self, task: str) -> bool:
        """Whether a task's runs look at validation rows on the way; where rows are long that takes too much time."""
        return self.scores and task not in self.batch_sizes

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(task, arm) in the order in which they are wanted."""
        ordered = [(task, arm) for tasks, arms in self.grid for task in tasks for arm in arms]
        return list(dict.fromkeys(ordered))


def read(file: Path, tasks: Sequence[str] | None = None) -> Settings:
    """Settings from YAML; of the grid the part with ``tasks``, if these are given.

    Raises:
        InputError: the file cannot be read, or names a task or an arm that does not exist.
    """
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
        team = Team(**raw["team"] | {"tasks": tuple(raw["team"]["tasks"])}) if "team" in raw else _NO_TEAM
        arms = {name: Arm(**arm) for name, arm in raw["arms"].items()}
        grid = tuple(
            (tuple(task for task in part["tasks"] if tasks is None or task in tasks), tuple(part["arms"]))
            for part in raw["grid"]
        )
        settings = Settings(**raw | {"team": team, "arms": arms, "grid": grid})
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error}); name a YAML file of settings.") from error
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no file of settings ({error}); see those beside this script.") from error
    for name, own in arms.items():
        if own.method not in get_args(Method):
            raise InputError(
                f"{file}: the arm {name} has method {own.method!r}; give one of {', '.join(get_args(Method))}."
            )
    for name in ("batch_sizes", "scored_items", "validation_rows"):
        for task in getattr(settings, name):
            if task not in SOURCES:
                raise InputError(f"{file}: {name} has {task}, which is no task; correct the name.")
    if settings.team is _NO_TEAM and (needing := [name for name, arm in arms.items() if arm.base != "base"]):
        raise InputError(f"{file}: the arm {needing[0]} needs a prepared base model; say under team how it is made.")
    if not settings.rates and (searching := [n for n, a in arms.items() if a.rate is None and a.rates_of is None]):
        raise InputError(f"{file}: the arm {searching[0]} has no rate and there are no rates to search; give either.")
    for task, arm in settings.pairs:
        if task not in SOURCES or arm not in arms:
            raise InputError(f"{file}: the grid has {task} with {arm}, one of which does not exist; correct the name.")
    return settings
