"""What a training step on a CPU saves when the process keeps the memory that the last one freed.

    python -m experiments.cpu.memory --rounds 5 --json results/cpu-memory.json

Steps of ``icarus train`` (a decoder, and ``--method lora``) on rows of 96 tokens, the last 24 of which carry loss. Two
processes take turns: in one, ``icarus.memory.keep`` was called. Of each step: seconds, and those of them that the
system took.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import SFTTrainer

from benchmarks.serve_micro.engine_process import EngineProcess
from experiments.trainer_steps import stepping
from icarus import adapter, arguments, base_model, memory, packaged_model
from icarus.bench import measure
from icarus.streams import IGNORED
from icarus.train import IcarusSFTTrainer
from icarus.train.config import IcarusSFTConfig

ROWS, TOKENS, COMPLETION, RANK = 8, 96, 24, 16
WAYS = ("default", "kept")
KINDS = {"icarus": (IcarusSFTTrainer, adapter.attach), "lora": (SFTTrainer, adapter.attach_conventional)}


def work(way: str, dtype: str, folder: str) -> None:
    """For each line of standard input: a step of the kind that it names."""
    if way == "kept":
        memory.keep()
    steps = {kind: _step(kind, dtype, folder) for kind in KINDS}
    for line in sys.stdin:
        step, started, before = steps[json.loads(line)["kind"]], time.perf_counter(), os.times().system
        step()
        print(json.dumps({"seconds": time.perf_counter() - started, "system": os.times().system - before}), flush=True)


def _step(kind: str, dtype: str, folder: str) -> Callable[[], None]:
    trainer_kind, attach = KINDS[kind]
    base, tokenizer = base_model.load(packaged_model.PACKAGED, dtype=dtype)
    torch.manual_seed(0)
    ids = torch.randint(1000, 2000, (ROWS, TOKENS))
    labels = ids.clone()
    labels[:, :-COMPLETION] = IGNORED
    rows = {"input_ids": ids.tolist(), "labels": labels.tolist()}
    if kind == "icarus":
        rows["position_ids"] = [list(range(TOKENS))] * ROWS
    settings: Any = IcarusSFTConfig(
        output_dir=str(Path(folder, kind)),
        learning_rate=1e-3,
        max_steps=1000,
        per_device_train_batch_size=ROWS,
        dataloader_pin_memory=False,
    )
    trainer: Any = trainer_kind(
        model=attach(base, rank=RANK),
        args=settings,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    return stepping(trainer, 1)


def measured(rounds: int, dtype: str) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Steps by kind and way; the first of each is for warming up."""
    samples: dict[str, Any] = {kind: {way: [] for way in WAYS} for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        started = {}
        for way in WAYS:
            command = (sys.executable, "-m", "experiments.cpu.memory", "--work", way, dtype, folder)
            log = Path(folder, f"{way}.log")
            started[way] = stack.enter_context(EngineProcess(way, log, os.environ, command))
        for round_ in range(rounds + 1):
            for kind in KINDS:
                for way in WAYS[:: 1 if round_ % 2 else -1]:
                    answer = started[way].ask({"kind": kind})
                    print(round_, kind, way, answer, file=sys.stderr, flush=True)
                    if round_:
                        samples[kind][way].append({name: round(value, 3) for name, value in answer.items()})
    return samples


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work)
        return
    dtype = measure.served_dtype()
    samples = measured(options.rounds, dtype)
    shares = {
        kind: round(
            statistics.median(k["seconds"] / d["seconds"] for k, d in zip(own["kept"], own["default"], strict=True)), 3
        )
        for kind, own in samples.items()
    }
    report = {
        "settings": measure.settings(dtype=dtype, rows=ROWS, tokens=TOKENS, completion=COMPLETION, rank=RANK),
        "kept over default": shares,
        "samples": samples,
    }
    print(json.dumps(shares))
    if options.json:
        arguments.write_json(report, options.json)


if __name__ == "__main__":
    main()
