"""``icarus bench train``: one training step of ICaRus beside conventional LoRA through PEFT, on the same batch.

A step is forward, backward and AdamW. Two batches: loss on a completion behind a long prompt, and loss on every token.
Two conventional sides: as Transformers' Trainer does it, with logits for every position, and with logits only where
the loss is, which is what a careful trainer would do; both keep activations for every token.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from icarus import adapter, base_model
from icarus.bench import measure
from icarus.streams import IGNORED, Batch, EncoderCache, TwoStreams

PROMPT, COMPLETION, BATCH, RANK = 768, 96, 2, 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``icarus bench train``."""
    measure.add_arguments(parser, repeats=5)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, and return the report."""
    base, dtype, repeats = options.base, options.dtype, options.repeats
    torch.manual_seed(0)
    icarus = adapter.attach(base_model.load(base, dtype=dtype)[0], rank=RANK).train()
    conventional = adapter.attach_conventional(base_model.load(base, dtype=dtype)[0], rank=RANK).train()
    ids = torch.randint(1000, 2000, (BATCH, PROMPT + COMPLETION), device=next(icarus.parameters()).device)
    report: dict[str, Any] = {
        "settings": measure.settings(
            base=base, dtype=dtype, prompt=PROMPT, completion=COMPLETION, batch=BATCH, rank=RANK, repeats=repeats
        ),
        "loss_on_completion": _compare(icarus, conventional, ids, PROMPT, repeats),
        "loss_on_all_tokens": _compare(icarus, conventional, ids, 1, max(repeats // 2, 2)),
    }
    _show(report)
    return report


def _compare(icarus: nn.Module, conventional: nn.Module, ids: Tensor, first: int, repeats: int) -> dict[str, Any]:
    """Loss on the tokens from position ``first`` on."""
    labels = ids.clone()
    labels[:, :first] = IGNORED
    streams, batch = TwoStreams(icarus), Batch.of(ids, labels)
    peaks: dict[str, list[int]] = {}
    sides = {
        "icarus": _step(icarus, lambda: streams.loss(batch)[0] / (batch.labels != IGNORED).sum()),
        "conventional": _step(conventional, lambda: conventional(input_ids=ids, labels=labels).loss),
        "conventional, logits where the loss is": _step(conventional, lambda: _lean_loss(conventional, ids, first)),
        "encoder pass alone": lambda: streams.encode(ids, EncoderCache()),
    }
    label = f"training, loss on {ids.shape[1] - first} of {ids.shape[1]} tokens"
    seconds = measure.alternate(sides, repeats, label)
    measure.alternate({n: _measured(s, peaks.setdefault(n, [])) for n, s in sides.items()}, 2, f"{label}, memory")
    memory = {name: max(round(statistics.median(values)), 1) for name, values in peaks.items()}
    result: dict[str, Any] = {"steps": {n: {**measure.summary(v), "peak_bytes": memory[n]} for n, v in seconds.items()}}
    for peer in ("conventional", "conventional, logits where the loss is"):
        result[f"speedup over {peer}"] = measure.ratio(seconds[peer], seconds["icarus"])
        result[f"memory saved over {peer}"] = round(memory[peer] / memory["icarus"], 2)
    both = statistics.median(seconds["encoder pass alone"]) + statistics.median(seconds["conventional"])
    result["step over the two passes' cost"] = round(statistics.median(seconds["icarus"]) / both, 3)
    return result


def _lean_loss(model: Any, ids: Tensor, first: int) -> Tensor:
    logits = model(input_ids=ids, logits_to_keep=ids.shape[1] - first + 1).logits[:, :-1]
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, first:].flatten())


def _step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def _measured(side: Callable[[], Any], peaks: list[int]) -> Callable[[], None]:
    def measured() -> None:
        with measure.peak_memory(peaks):
            side()

    return measured


def _show(report: dict[str, Any]) -> None:
    console = Console()
    for key in ("loss_on_completion", "loss_on_all_tokens"):
        figures = report[key]
        title = f"One training step: {key.replace('_', ' ')} ({BATCH} x ({PROMPT} + {COMPLETION}) tokens, rank {RANK})"
        table = Table("side", title=title)
        for column in ("step", "peak memory above the model", "time / ICaRus", "memory / ICaRus"):
            table.add_column(column, justify="right")
        ours = figures["steps"]["icarus"]
        for name, values in figures["steps"].items():
            table.add_row(
                name,
                f"{values['median_ms'] / 1e3:.2f} s",
                f"{values['peak_bytes'] / 1e6:,.0f} MB",
                f"{values['median_ms'] / ours['median_ms']:.2f}x",
                f"{values['peak_bytes'] / ours['peak_bytes']:.2f}x",
            )
        console.print(table)
