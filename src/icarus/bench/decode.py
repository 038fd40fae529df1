"""``icarus bench decode``: a decode step beside the base model's, conventional LoRA's and the two-pass form's.

All sides take the same token behind the same context of 256 tokens, through the model's own forward, and stop at the
logits. The bound at batch 1 is memory: each weight is read once per pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
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
    """Measure, print tables, and return the report."""
    base, dtype, repeats = options.base, options.dtype, options.repeats
    torch.manual_seed(0)
    plain, _ = base_model.load(base, dtype=dtype)
    conventional = _random(adapter.attach_conventional(base_model.load(base, dtype=dtype)[0], rank=RANK))
    icarus = _random(adapter.attach(base_model.load(base, dtype=dtype)[0], rank=RANK))
    bandwidth = measure.read_bandwidth()
    weights = sum(p.numel() * p.element_size() for p in plain.parameters())
    title = f"One decode step, batch %d, context {CONTEXT}, rank {RANK}, {dtype}"
    batches = {}
    for batch in BATCHES:
        batches[batch] = measure.compare(_sides(plain, conventional, icarus, batch), repeats, f"decode, batch {batch}")
        measure.show_steps(title % batch, batches[batch])
    milliseconds = 1e3 * weights / bandwidth
    print(
        f"Bound at batch 1: {weights / 1e6:.0f} MB of weights at {bandwidth / 1e9:.1f} GB/s take {milliseconds:.1f} ms "
        "a pass."
    )
    return {
        "settings": measure.settings(base=base, dtype=dtype, context=CONTEXT, rank=RANK, repeats=repeats),
        "bound": {
            "what": "base weights read once per pass",
            "weight_bytes": weights,
            "read_bytes_per_s": round(bandwidth),
            "ms": round(milliseconds, 2),
        },
        "batches": {
            str(batch): {"steps": {n: asdict(s) for n, s in steps.items()}} for batch, steps in batches.items()
        },
    }


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
