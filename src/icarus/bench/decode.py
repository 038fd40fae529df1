"""``icarus bench decode``: a decode step beside the base model's, conventional LoRA's and the two-pass form's.

All sides take the same token behind the same context of 256 tokens, through the model's own forward, and stop at the
logits. The bound at batch 1 is memory: each weight is read once per pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import DynamicCache

from icarus import adapter, base_model
from icarus.bench import measure
from icarus.streams import EncoderCache, TwoStreams

CONTEXT, RANK, BATCHES = 256, 16, (1, 8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``icarus bench decode``."""
    measure.add_arguments(parser, repeats=20)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, and return the report."""
    base, dtype, repeats = options.base, options.dtype, options.repeats
    torch.manual_seed(0)
    plain, _ = base_model.load(base, dtype=dtype)
    conventional = _random(adapter.attach_conventional(base_model.load(base, dtype=dtype)[0], rank=RANK))
    icarus = _random(adapter.attach(base_model.load(base, dtype=dtype)[0], rank=RANK))
    bandwidth = measure.read_bandwidth()
    weights = sum(p.numel() * p.element_size() for p in plain.parameters())
    report: dict[str, Any] = {
        "settings": measure.settings(base=base, dtype=dtype, context=CONTEXT, rank=RANK, repeats=repeats),
        "bound": {
            "what": "base weights read once per pass",
            "weight_bytes": weights,
            "read_bytes_per_s": round(bandwidth),
            "ms": round(1e3 * weights / bandwidth, 2),
        },
        "batches": {},
    }
    for batch in BATCHES:
        sides = _sides(plain, conventional, icarus, batch)
        seconds = measure.alternate(sides, repeats, f"decode, batch {batch}")
        report["batches"][str(batch)] = {
            "steps": {name: measure.summary(values) for name, values in seconds.items()},
            "parallel_over_conventional": measure.ratio(seconds["icarus"], seconds["conventional"]),
            "parallel_over_base": measure.ratio(seconds["icarus"], seconds["base"]),
            "sequential_over_parallel": measure.ratio(seconds["icarus, two passes"], seconds["icarus"]),
        }
    _show(report)
    return report


def _random(model: nn.Module) -> nn.Module:
    """LoRA starts as zero; random weights make sure that nothing is skipped for being zero."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.01)
    return model.eval()


def _sides(plain: Any, conventional: Any, icarus: nn.Module, batch: int) -> dict[str, Callable[[], Any]]:
    prompt = torch.randint(1000, 2000, (batch, CONTEXT), device=plain.device)
    token = torch.randint(1000, 2000, (batch, 1), device=plain.device)
    streams = TwoStreams(icarus)
    cache = EncoderCache()
    streams.encode(prompt, cache)

    def usual(model: Any) -> Callable[[], Any]:
        kv = DynamicCache()
        with torch.no_grad():
            model(input_ids=prompt, past_key_values=kv, logits_to_keep=1)
        return lambda: _usual_step(model, token, kv)

    def ours(parallel: bool) -> Callable[[], Any]:
        def step() -> None:
            streams.step(token, cache, "default", parallel=parallel)
            cache.truncate(CONTEXT)

        return step

    return {
        "base": usual(plain),
        "conventional": usual(conventional),
        "icarus": ours(True),
        "icarus, two passes": ours(False),
    }


@torch.no_grad()
def _usual_step(model: Any, token: Tensor, kv: DynamicCache) -> None:
    model(input_ids=token, past_key_values=kv, use_cache=True)
    kv.crop(-1)


def _show(report: dict[str, Any]) -> None:
    console = Console()
    table = Table(title=f"One decode step, context {CONTEXT}, rank {RANK}, {report['settings']['dtype']}")
    for column in ("batch", "base", "conventional LoRA", "ICaRus", "ICaRus, two passes", "ICaRus / conventional"):
        table.add_column(column, justify="right")
    for batch, figures in report["batches"].items():
        steps = [f"{values['median_ms']:.1f} ms" for values in figures["steps"].values()]
        table.add_row(batch, *steps, f"{figures['parallel_over_conventional']:.2f}x")
    console.print(table)
    bound = report["bound"]
    console.print(
        f"Bound at batch 1: {bound['weight_bytes'] / 1e6:.0f} MB of weights at "
        f"{bound['read_bytes_per_s'] / 1e9:.1f} GB/s take {bound['ms']:.1f} ms a pass."
    )
