"""``icarus bench train``: one training step of ICaRus beside conventional LoRA through PEFT, on the same batch.

A step is forward, backward and AdamW. Two batches: loss on a completion behind a long prompt, and loss on every token.
Two conventional sides: as Transformers' Trainer does it, with logits for every position, and with logits only where
the loss is, which is what a careful trainer would do; both keep activations for every token.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icarus import adapter, base_model, memory
from icarus.bench import measure
from icarus.bench.measure import Step
from icarus.streams import IGNORED, Batch, EncoderCache, TwoStreams

PROMPT, COMPLETION, BATCH, RANK = 768, 96, 2, 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``icarus bench train``."""
    measure.add_arguments(parser, repeats=5)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print tables, and return the report."""
    if not torch.cuda.is_available():
        memory.keep()  # as icarus train does
    base, dtype, repeats = options.base, options.dtype, options.repeats
    torch.manual_seed(0)
    icarus = adapter.attach(base_model.load(base, dtype=dtype)[0], rank=RANK).train()
    conventional = adapter.attach_conventional(base_model.load(base, dtype=dtype)[0], rank=RANK).train()
    ids = torch.randint(1000, 2000, (BATCH, PROMPT + COMPLETION), device=next(icarus.parameters()).device)
    losses = {
        "loss_on_completion": _compare(icarus, conventional, ids, PROMPT, repeats),
        "loss_on_all_tokens": _compare(icarus, conventional, ids, 1, max(repeats // 2, 2)),
    }
    sizes = {"prompt": PROMPT, "completion": COMPLETION, "batch": BATCH, "rank": RANK}
    return {
        "settings": measure.settings(base=base, dtype=dtype, **sizes, repeats=repeats),
        **{name: {"steps": {n: asdict(s) for n, s in steps.items()}} for name, steps in losses.items()},
    }


def _compare(icarus: nn.Module, conventional: nn.Module, ids: Tensor, first: int, repeats: int) -> dict[str, Step]:
    """Loss on the tokens from position ``first`` on."""
    labels = ids.clone()
    labels[:, :first] = IGNORED
    streams, batch = TwoStreams(icarus), Batch.of(ids, labels)
    sides = {
        "icarus": _step(icarus, lambda: streams.loss(batch)[0] / (batch.labels != IGNORED).sum()),
        "conventional": _step(conventional, lambda: conventional(input_ids=ids, labels=labels).loss),
        "conventional, logits where the loss is": _step(conventional, lambda: _lean_loss(conventional, ids, first)),
        "encoder pass alone": lambda: streams.encode(ids, EncoderCache()),
    }
    loss = f"loss on {ids.shape[1] - first} of {ids.shape[1]} tokens"
    steps = measure.compare(sides, repeats, f"training, {loss}", memory=True)
    measure.show_steps(f"One training step, {loss}, batch {BATCH}, rank {RANK}", steps)
    return steps


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
