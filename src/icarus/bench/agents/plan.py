"""What is run, in which order, with which KV budgets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from icarus.bench.agents import workloads
from icarus.bench.agents.settings import ROOMY, TIGHT, Settings
from icarus.bench.agents.workloads import Trajectory, Workflow
from icarus.errors import InputError

TIGHT_SLACK, ROOMY_SLACK = 1.25, 1.1
"""KV budget over the working set that it is for: a block is not always where it is wanted."""


@dataclass(frozen=True)
class Place:
    """What repeats of a run have in common."""

    system: str
    models: int
    budget: str
    workload: str
    rate: float | None  # workflows a second; None: all at once

    @property
    def load(self) -> tuple[str, str, float | None]:
        """What systems have in common that are compared."""
        return self.budget, self.workload, self.rate


@dataclass(frozen=True)
class Unit(Place):
    """One run to measure."""

    repeat: int

    @property
    def place(self) -> Place:
        """Without the repeat."""
        return Place(self.system, self.models, self.budget, self.workload, self.rate)

    def __str__(self) -> str:
        load = "all at once" if self.rate is None else f"{self.rate:g} workflows/s"
        return f"{self.system}, N={self.models}, {self.budget}, {self.workload}, {load}, repeat {self.repeat + 1}"


@dataclass(frozen=True)
class Requests:
    """Gives each unit its workflows and arrivals: the same for all systems and numbers of models."""

    settings: Settings
    vocabulary: int
    trajectories: Sequence[Trajectory] = ()

    def workflows(self, workload: str, rate: float | None, repeat: int) -> list[Workflow]:
        """The workflows of one run."""
        s, count = self.settings, self._count(rate)
        return workloads.make(workload, count, s, self.vocabulary, self._seed(repeat), self.trajectories)

    def arrivals(self, rate: float | None, repeat: int) -> list[float]:
        """Seconds at which they start."""
        return workloads.arrivals(self._count(rate), rate and self.settings.window, self._seed(repeat))

    def working_set(self, workload: str, models: int, *, shared: bool) -> int:
        """Tokens of K/V that all workflows at once hold if nothing is evicted."""
        own = self.workflows(workload, None, 0)
        return workloads.working_set(own, models, self.settings.block_size, shared=shared)

    def _count(self, rate: float | None) -> int:
        return self.settings.workflows if rate is None else self.settings.arriving(rate)

    def _seed(self, repeat: int) -> str:
        return f"{self.settings.seed}/{repeat}"


def budgets(requests: Requests) -> dict[str, int]:
    """KV tokens of each budget, in whole blocks.

    Tight: what one shared cache of the first workload needs, so that the caches of several models do not fit. Roomy:
    what the most models need with a cache each, for the workload that needs most.

    Raises:
        InputError: a budget does not hold one context of the longest length.
    """
    s = requests.settings
    most = s.most_models
    sizes = {
        TIGHT: s.tight_tokens or TIGHT_SLACK * requests.working_set(s.workloads[0], most, shared=True),
        ROOMY: s.roomy_tokens
        or ROOMY_SLACK * max(requests.working_set(workload, most, shared=False) for workload in s.workloads),
    }
    whole = {name: math.ceil(sizes[name] / s.block_size) * s.block_size for name in s.budgets}
    for name, tokens in whole.items():
        if tokens <= s.max_model_len:
            raise InputError(
                f"The {name} KV budget of {tokens} tokens does not hold one context of --max-model-len "
                f"{s.max_model_len}; give more workflows, or a larger budget."
            )
    return whole


def units(settings: Settings) -> Iterator[Unit]:
    """All runs, in order; neighbours with the same server share it. The order of systems alternates over repeats.

    What matters most comes first, and ``stock``, which takes longest, last. Repeated is the headline: the most models
    in the first budget, on the first workload, all at once and at the first rate.
    """
    quick, slow = (tuple(s for s in settings.systems if (s == "stock") is last) for last in (False, True))
    for systems in (quick, slow):
        for budget in settings.budgets:
            for models in sorted(settings.models, reverse=True):
                for repeat in range(settings.repeats):
                    for system in systems[:: -1 if repeat % 2 else 1]:
                        if _runs(system, models, budget, repeat, settings):
                            counted = 1 if system == "base" else models
                            for workload, rate in _loads(system, models, budget, repeat, settings):
                                yield Unit(system, counted, budget, workload, rate, repeat)


def _runs(system: str, models: int, budget: str, repeat: int, settings: Settings) -> bool:
    """``stock`` and ``base`` are points to compare with at the headline; other budgets are for the most models."""
    first = budget == settings.budgets[0]
    headline = first and models == settings.most_models
    if system in ("stock", "base"):
        return headline and (system == "base" or not repeat)
    return (headline or not repeat) and (first or models == settings.most_models)


def _loads(
    system: str, models: int, budget: str, repeat: int, settings: Settings
) -> Iterator[tuple[str, float | None]]:
    swept, *others = settings.workloads
    yield swept, None
    if budget != settings.budgets[0] or system == "stock" or (system == "base" and repeat):
        return
    for rate in settings.rates[: 1 if repeat else None]:
        yield swept, rate
    if models == settings.most_models and not repeat:
        yield from ((workload, None) for workload in others)
