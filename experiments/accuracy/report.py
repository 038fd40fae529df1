"""From the results to what people look at: tables, curves, and scores with their intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.accuracy import work
from experiments.accuracy.plan import Cell, best_rate
from icarus import arguments, atomic
from icarus.context import BASE
from icarus.evaluate import Outcome
from icarus.evaluate.report import shown, summary

PEER = "conventional"
"""The arm that the others are compared with."""


def run(place: work.Place) -> None:
    """Write ``summary.json``, ``summary.md`` and the plots beside the results."""
    report = {task: _task(place, task) for task in _tasks(place)}
    arguments.write_json({"tasks": report}, str(place.results / "summary.json"))
    atomic.write_text(
        place.results / "summary.md", "\n\n".join(_table(task, arms) for task, arms in report.items()) + "\n"
    )
    for task in report:
        _plot_curves(place, task)
    _plot_scores(report, place.results / "scores.png")


def _tasks(place: work.Place) -> list[str]:
    tasks = dict.fromkeys(task for task, _ in place.settings.pairs)
    return [task for task in tasks if any(place.results.glob(f"{task}.*.json"))]


def _task(place: work.Place, task: str) -> dict[str, Any]:
    """Of each arm: its search, its runs at the best rate, and how these compare with the peer's of the same seed."""
    arms = [arm for name, arm in place.settings.pairs if name == task]
    report: dict[str, Any] = {BASE: {"seeds": _seeds(place, task, BASE, 0.0)}}
    for arm in arms:
        rate = best_rate(place.settings, task, arm, place.loss)
        report[arm] = {"search": _search(place, task, arm), "rate": rate, "seeds": {}}
        if rate is not None:
            report[arm]["seeds"] = _seeds(place, task, arm, rate)
    return report


def _search(place: work.Place, task: str, arm: str) -> dict[str, float]:
    """Validation loss by rate, of the first seed."""
    seed = place.settings.seeds[0]
    names = [file.name.removesuffix(f".{seed}.json") for file in place.results.glob(f"{task}.{arm}.*.{seed}.json")]
    rates = sorted(float(name.removeprefix(f"{task}.{arm}.")) for name in names)
    losses = {rate: place.loss(Cell(task, arm, rate, seed)) for rate in rates}
    return {f"{rate:g}": round(loss, 4) for rate, loss in losses.items() if loss is not None}


def _seeds(place: work.Place, task: str, arm: str, rate: float) -> dict[str, Any]:
    """By seed: loss and score on held-back items, and the differences to the peer's run of that seed."""
    peer_rate = best_rate(place.settings, task, PEER, place.loss)
    found: dict[str, Any] = {}
    for seed in place.settings.seeds if arm != BASE else (0,):
        cell = Cell(task, arm, rate, seed)
        training, own = work.read(place.result(cell)), _outcomes(place, cell)
        if not own:
            continue
        peer = [] if peer_rate is None else _outcomes(place, Cell(task, PEER, peer_rate, seed))
        against = PEER if peer else arm
        figures = summary(
            [*own, *([] if arm == PEER else peer)], {arm: arm, PEER: PEER} if peer else {arm: arm}, against
        )
        found[str(seed)] = figures[task][arm] | (
            {}
            if training is None
            else {name: training[name] for name in ("validation_loss", "trainable", "tokens", "seconds", "peak_bytes")}
        )
    return found


def _outcomes(place: work.Place, cell: Cell) -> list[Outcome]:
    """The items of a run; the text of answers is not kept."""
    scores = work.read(place.scores(cell))
    if scores is None or scores["identity"] != work.identity(place, cell):
        return []
    columns = {name: text.split(" ") for name, text in scores["items"].items()}
    return [
        Outcome(
            task=cell.task,
            side=cell.arm,
            item=item,
            score=float(score),
            loss=float(loss),
            tokens=int(tokens),
            text="",
            generated_tokens=int(generated),
            drift=None if drift == "-" else float(drift),
        )
        for item, score, loss, tokens, generated, drift in zip(
            *(columns[name] for name in ("item", "score", "loss", "tokens", "generated", "drift")), strict=True
        )
    ]


# ------------------------------------------------------------------------------------------------ tables


def _table(task: str, arms: Mapping[str, Any]) -> str:
    """A table in Markdown: a row for each arm, with both seeds' figures in each cell."""
    lines = [
        f"### {task}",
        "",
        f"| arm | rate | loss | over {PEER} | score | over {PEER} | drift |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, own in arms.items():
        seeds = list(own["seeds"].values())
        if not seeds:
            tried = ", ".join(f"{rate}: {loss}" for rate, loss in own["search"].items()) or "not run"
            lines.append(f"| {arm} | search: {tried} | | | | | |")
            continue
        cells = [
            arm,
            f"{own['rate']:g}" if own.get("rate") else "",
            _both(f"{seed['loss']:.3f}" for seed in seeds),
            _both(shown(seed.get("difference", {}).get("loss"), 1, ".3f") for seed in seeds),
            _both(f"{100 * seed['score']:.1f}" for seed in seeds),
            _both(shown(seed.get("difference", {}).get("score"), 100, ".1f") for seed in seeds),
            _both(f"{seed['drift']:.2f}" if "drift" in seed else "" for seed in seeds),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _both(texts: Iterator[str] | Sequence[str]) -> str:
    return "; ".join(text for text in texts if text)


# ------------------------------------------------------------------------------------------------- plots


def _plot_curves(place: work.Place, task: str) -> None:
    """Validation loss over tokens seen and over wall time, of each arm at its best rate so far."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    times = work.read(place.results / "times.json") or {"tasks": {}}
    for arm in [arm for name, arm in place.settings.pairs if name == task]:
        searched = _search(place, task, arm)
        if not searched:
            continue
        rate = min(searched, key=lambda name: searched[name])
        result = work.read(place.result(Cell(task, arm, float(rate), place.settings.seeds[0])))
        if not result or not result["validation"]:
            continue
        steps, losses = zip(*result["validation"], strict=True)
        axes[0].plot(
            [step * result["tokens"] / result["steps"] for step in steps], losses, "o-", label=f"{arm}, {rate}"
        )
        step_time = times["tasks"].get(task, {}).get(arm)
        if step_time:
            axes[1].plot([step * step_time["median_ms"] / 1e3 for step in steps], losses, "o-", label=arm)
    axes[0].set(xlabel="tokens seen", ylabel="validation loss (nats per token)", title=task)
    axes[1].set(xlabel="seconds, from alternating step times", title="the same over wall time")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(place.results / f"{task}.png", dpi=120)
    plt.close(figure)


def _plot_scores(report: Mapping[str, Any], file: Path) -> None:
    """Differences to the peer with their intervals: scores in points, losses in nats."""
    rows = [
        (f"{task}: {arm}, seed {seed}", figures["difference"])
        for task, arms in report.items()
        for arm, own in arms.items()
        for seed, figures in own["seeds"].items()
        if "difference" in figures
    ]
    if not rows:
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.2 + 0.3 * len(rows)), sharey=True)
    for axis, name, scale, label in zip(axes, ("score", "loss"), (100, 1), ("points", "nats per token"), strict=True):
        for place, (_, difference) in enumerate(rows):
            low, high = (scale * bound for bound in difference[name]["interval"])
            axis.plot([low, high], [place, place], color="tab:blue")
            axis.plot(scale * difference[name]["value"], place, "o", color="tab:blue")
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(xlabel=label, title=f"{name} over {PEER}")
        axis.grid(alpha=0.3, axis="x")
    axes[0].set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
