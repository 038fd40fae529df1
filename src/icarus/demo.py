"""``icarus demo``: the shipped specialists take turns in one context: a real model, on the CPU, in a minute.

First live: who speaks, how many tokens were encoded and how many were cached, how much the one cache holds, and what
the base model alone would have said. Then the same tokens again both ways, alternating: an ordinary LoRA and a KV cache
for each model, and ICaRus.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from icarus import adapter, arguments, base_model, packaged_model, shipped_specialists
from icarus.bench import measure, replay
from icarus.context import BASE, Context, Specialists, Turn

_COLORS = ("cyan", "green", "magenta", "yellow")
_MAX_NEW_TOKENS = 48
_ROUNDS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``icarus demo``."""
    parser.add_argument("--threads", type=arguments.positive_int, help="CPU threads (default: all cores)")
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Play the conversation, then compare both ways; prints as it goes and returns the figures."""
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console()
    started = time.perf_counter()
    team = Specialists.load(packaged_model.PREPARED, shipped_specialists.shipped())
    colors = dict(zip(team.names[1:], _COLORS, strict=False))
    console.print(
        f"[bold]ICaRus demo[/bold]: {len(colors)} specialists take turns in one context, with one KV cache. Their base "
        f"model is SmolLM2-135M, prepared for the team. Loaded in {time.perf_counter() - started:.1f} s."
    )
    context, turns = _converse(console, team, colors)
    comparison = _compare(console, team, context, turns)
    _show_figures(console)
    console.print(f"[dim]{time.perf_counter() - started:.0f} s in total.[/dim]")
    return {
        "settings": measure.settings(base=packaged_model.PREPARED, specialists=list(colors)),
        "turns": [{"model": t.model, "text": t.text, **_counts(t)} for t, _ in turns],
        **comparison,
        "figures": shipped_specialists.figures(),
    }


def _counts(turn: Turn) -> dict[str, Any]:
    return {
        "encoded_tokens": turn.encoded_tokens,
        "cached_tokens": turn.cached_tokens,
        "kv_bytes": turn.kv_bytes,
        "seconds": round(turn.seconds, 3),
    }


# --------------------------------------------------------------------------------------------- live


def _converse(console: Console, team: Specialists, colors: dict[str, str]) -> tuple[Context, list[tuple[Turn, int]]]:
    """Play the script; returns the context, and each turn with the position at which it began."""
    context, turns = team.context(), []
    for step in shipped_specialists.conversation():
        context.append(step["messages"])
        console.print()
        _dim(console, step["messages"][-1]["content"])
        _show_base(console, context.fork())
        console.print(f"[bold {colors[step['model']]}]{step['model']:>8}[/]  ", end="")
        turn = context.generate(
            step["model"], max_new_tokens=_MAX_NEW_TOKENS, stream=lambda text: console.out(text, end="")
        )
        turns.append((turn, len(context.token_ids) - len(turn.token_ids)))
        console.print()
        _dim(console, f"          {turn.encoded_tokens} tokens encoded, {turn.cached_tokens} cached; ", end="")
        _dim(console, f"{turn.kv_bytes / 1e6:.1f} MB of KV held for all. Reference: {step['reference']}")
    return context, turns


def _show_base(console: Console, fork: Context) -> None:
    turn = fork.generate(BASE, max_new_tokens=20)
    line = " ".join(turn.text.split())
    _dim(console, f"    base  {line}{'' if turn.finish_reason == 'stop' else ' ...'}")


def _dim(console: Console, text: str, end: str = "\n") -> None:
    console.print(Text(text, style="dim"), end=end)


# --------------------------------------------------------------------------------------------- both ways


def _compare(console: Console, team: Specialists, context: Context, turns: list[tuple[Turn, int]]) -> dict[str, Any]:
    tokens = torch.tensor([context.token_ids])
    speeches = [replay.Speech(turn.model, start, start + len(turn.token_ids)) for turn, start in turns]
    peer: Any = base_model.load(packaged_model.PREPARED)[0]
    rank = max(adapter.verify(folder).rank for folder in shipped_specialists.shipped().values())
    for name in team.names[1:]:
        peer = adapter.attach_conventional(peer, name=name, rank=rank)
    peer.eval()
    costs: dict[str, replay.Cost] = {}

    def conventional() -> None:
        costs["conventional"] = replay.conventional(peer, tokens, speeches)

    def icarus() -> None:
        costs["icarus"] = replay.icarus(team.streams, tokens, speeches)

    sides = {"conventional": conventional, "icarus": icarus}
    seconds = measure.alternate(sides, _ROUNDS, "the same work both ways")
    result = {
        name: {"seconds": round(statistics.median(seconds[name]), 3), **vars(cost)} for name, cost in costs.items()
    }
    _show_comparison(console, result, len(turns))
    return result


def _show_comparison(console: Console, result: dict[str, Any], turns: int) -> None:
    table = Table(title=f"The same {turns} turns again, measured in this run (median of {_ROUNDS}, alternating)")
    for column in ("", "seconds", "prompt tokens prefilled", "KV cache"):
        table.add_column(column, justify="right")
    rows = (("conventional: a LoRA and a KV cache per model", "conventional"), ("ICaRus: one KV cache", "icarus"))
    for label, name in rows:
        figures = result[name]
        kv = f"{figures['kv_bytes'] / 1e6:.1f} MB"
        table.add_row(label, f"{figures['seconds']:.2f}", str(figures["prefilled_tokens"]), kv)
    ours, theirs = result["icarus"], result["conventional"]
    table.add_row(
        "gain",
        *(f"{theirs[key] / ours[key]:.1f}x" for key in ("seconds", "prefilled_tokens", "kv_bytes")),
        style="bold",
    )
    console.print()
    console.print(table)


def _show_figures(console: Console) -> None:
    table = Table(title="The specialists on unseen data (recorded; see results/specialists.json)")
    for column in ("", "task, measure", "SmolLM2", "3 examples", "prepared base", "specialist"):
        table.add_column(column)
    for name, figures in shipped_specialists.figures().items():
        sides = ("packaged model", "packaged model, three examples", "prepared base", "specialist")
        *others, own = (f"{figures[side]:.1%}" for side in sides)
        table.add_row(name, f"{figures['task']}, {figures['measure']}", *others, f"[bold]{own}[/]")
    console.print(table)
