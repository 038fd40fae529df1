"""From results to what is printed: scores, losses, and differences with their intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from scipy.stats import bootstrap

from icarus.evaluate.run import Outcome

_CONFIDENCE = 0.95
_RESAMPLES = 9999


def summary(outcomes: Iterable[Outcome], kinds: Mapping[str, str], against: str) -> dict[str, Any]:
    """``{task: {side: figures}}``; scores are means over items, losses means over tokens.

    The difference to the side ``against`` has a 95 % interval by paired bootstrap over items (SciPy's, percentile, with
    a fixed seed); None with fewer than two items.
    """
    results: dict[str, dict[str, list[Outcome]]] = {}
    for outcome in outcomes:
        results.setdefault(outcome.task, {}).setdefault(outcome.side, []).append(outcome)
    return {
        task: {side: _figures(sides[side], sides[against], kinds[side]) for side in kinds if side in sides}
        for task, sides in results.items()
    }


def _figures(own: Sequence[Outcome], peer: Sequence[Outcome], kind: str) -> dict[str, Any]:
    scores, losses, tokens = _columns(own)
    figures: dict[str, Any] = {
        "kind": kind,
        "items": len(own),
        "score": float(scores.mean()),
        "loss": float(losses.sum() / tokens.sum()),
    }
    if generated := sum(outcome.generated_tokens for outcome in own):
        figures["drift"] = sum((outcome.drift or 0) * outcome.generated_tokens for outcome in own) / generated
    if own is not peer:
        its_scores, its_losses, _ = _columns(peer)
        figures["difference"] = {
            "score": difference(scores - its_scores, np.ones_like(tokens)),
            "loss": difference(losses - its_losses, tokens),
        }
    return figures


def _columns(outcomes: Sequence[Outcome]) -> tuple[Any, Any, Any]:
    """Scores, summed losses and tokens, in the order of the items' names, so that two sides are paired."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.item)
    tokens = np.array([outcome.tokens for outcome in ordered], dtype=float)
    return np.array([o.score for o in ordered]), np.array([o.loss for o in ordered]) * tokens, tokens


def difference(values: Any, weights: Any) -> dict[str, Any]:
    """Of paired items: the sum of the values over that of their weights, and its interval."""

    def ratio(values: Any, weights: Any, axis: int = -1) -> Any:
        return values.sum(axis=axis) / weights.sum(axis=axis)

    interval = None
    if len(values) > 1:
        drawn = bootstrap(
            (values, weights),
            ratio,
            paired=True,
            vectorized=True,
            batch=200,
            n_resamples=_RESAMPLES,
            confidence_level=_CONFIDENCE,
            method="percentile",
            rng=0,
        ).confidence_interval
        interval = [float(drawn.low), float(drawn.high)]
    return {"value": float(ratio(values, weights)), "interval": interval}


def show(figures: Mapping[str, Mapping[str, Any]], against: str) -> None:
    """A table for each task on the terminal."""
    for task, sides in figures.items():
        items = next(iter(sides.values()))["items"]
        names = ("kind", "score", f"over {against}", "loss/token", f"over {against}", "drift/token")
        title = f"{task}: {items} item{'' if items == 1 else 's'}"
        table = Table("side", *(Column(name, justify="right", overflow="fold") for name in names), title=title)
        for side, own in sides.items():
            difference = own.get("difference", {})
            table.add_row(
                side,
                own["kind"],
                f"{100 * own['score']:.1f}",
                shown(difference.get("score"), 100, ".1f"),
                f"{own['loss']:.4f}",
                shown(difference.get("loss"), 1, ".4f"),
                f"{own['drift']:.3f}" if "drift" in own else "",
            )
        _print(table)


def _print(table: Table) -> None:
    """On a terminal as wide as that; elsewhere as wide as the table and its title."""
    console = Console()
    if not console.is_terminal:
        needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
        console.width = max(needed, cell_len(str(table.title)))
    console.print(table)


def shown(difference: Mapping[str, Any] | None, scale: int, form: str) -> str:
    """A difference times ``scale`` with its interval, each number in the format ``form``."""
    if difference is None:
        return ""
    value = format(scale * difference["value"], f"+{form}")
    if difference["interval"] is None:
        return value
    low, high = (format(scale * bound, f"+{form}") for bound in difference["interval"])
    return f"{value} [{low}, {high}]"
