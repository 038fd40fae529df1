"""What ``waiting.py`` measures in process: for each line that comes, seconds of a turn and of a training step."""

from __future__ import annotations

import json
import sys
import time

import torch

from icarus import Specialists, adapter, base_model, packaged_model, shipped_specialists
from icarus.streams import IGNORED, Batch, TwoStreams

TOKENS, PROMPT, COMPLETION, BATCH, RANK = 24, 192, 32, 2, 16


def main() -> None:
    """Until standard input ends."""
    torch.manual_seed(0)
    shipped = shipped_specialists.shipped()
    base, tokenizer = base_model.load(packaged_model.PREPARED, dtype="float32")
    base.generation_config.eos_token_id = None  # all turns are of one length
    team = Specialists(base, tokenizer)
    speaker, folder = next(iter(shipped.items()))
    team.add(speaker, folder)
    model = adapter.attach(base_model.load(packaged_model.PACKAGED, dtype="float32")[0], rank=RANK).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(1000, 2000, (BATCH, PROMPT + COMPLETION))
    labels = ids.clone()
    labels[:, :PROMPT] = IGNORED
    streams, batch = TwoStreams(model), Batch.of(ids, labels)

    def turn() -> None:
        prompt = torch.randint(1000, 2000, (PROMPT,)).tolist()
        team.context().append(prompt).generate(speaker, max_new_tokens=TOKENS)

    def step() -> None:
        loss: torch.Tensor = streams.loss(batch)[0] / (BATCH * COMPLETION)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    for _ in sys.stdin:
        seconds = {}
        for name, work in (("turn in process", turn), ("training step", step)):
            started = time.perf_counter()
            work()
            seconds[name] = time.perf_counter() - started
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
