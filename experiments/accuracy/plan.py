"""Which run comes next: the search for each arm's learning rate, then further seeds at the best one, then scores.

Everything follows from the results that are there, so it can be stopped and started at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from experiments.accuracy.settings import Settings

Loss = Callable[["Cell"], float | None]


@dataclass(frozen=True)
class Cell:
    """One training run."""

    task: str
    arm: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Its files' name."""
        return f"{self.task}.{self.arm}.{self.rate:g}.{self.seed}"


@dataclass(frozen=True)
class Wanted:
    """A run, and whether its adapter's answers are scored as well."""

    cell: Cell
    scored: bool


def wanted(settings: Settings, loss: Loss) -> Iterator[Wanted]:
    """All runs that can be started, the most wanted first; ``loss`` is that of a finished run, else None."""
    for task, arm in settings.pairs:
        best = best_rate(settings, task, arm, loss)
        teacher = settings.arms[arm].teacher
        if teacher and best_rate(settings, task, teacher, loss) is None:
            continue
        if best is not None:
            scored = settings.scores and not settings.arms[arm].in_process
            yield from (Wanted(Cell(task, arm, best, seed), scored) for seed in settings.seeds)
        elif settings.arms[arm].rates_of is None:
            yield from (Wanted(cell, False) for cell in _search(settings, task, arm, loss))


def best_rate(settings: Settings, task: str, arm: str, loss: Loss) -> float | None:
    """The rate with the lowest validation loss at the end; None while the search goes on."""
    own = settings.arms[arm]
    if own.rate is not None:
        return own.rate
    if own.rates_of is not None:
        return best_rate(settings, task, own.rates_of, loss)
    losses = {cell.rate: loss(cell) for cell in _search(settings, task, arm, loss)}
    if any(value is None for value in losses.values()):
        return None
    return min(losses, key=lambda rate: losses[rate] or 0.0)


def _search(settings: Settings, task: str, arm: str, loss: Loss) -> list[Cell]:
    """The runs of a search so far, those that it needs next included: the grid grows while its best is at an edge."""
    rates = sorted(settings.rates)
    while True:
        cells = [Cell(task, arm, rate, settings.seeds[0]) for rate in rates]
        losses = [loss(cell) for cell in cells]
        known = [value for value in losses if value is not None]
        if len(known) < len(cells):
            return cells
        best = losses.index(min(known))
        if best == 0:
            rates.insert(0, rates[0] / 2)
        elif best == len(rates) - 1:
            rates.append(rates[-1] * 2)
        else:
            return cells
