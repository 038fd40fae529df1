"""Step times of the arms on the rows of each task, alternating in one process: what equal wall time means.

A step is what the product's trainers do: forward, backward and the optimizer's step on one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from trl import SFTTrainer

from experiments.accuracy import bfloat16, peer, work
from experiments.accuracy.data import Row
from experiments.accuracy.settings import Arm
from experiments.trainer_steps import stepping
from icarus import adapter, arguments, base_model, memory
from icarus.bench import measure
from icarus.train import IcarusSFTTrainer
from icarus.train.config import IcarusSFTConfig
from icarus.train.data import token_rows


def run(place: work.Place, tasks: Sequence[str], arms: Sequence[str], repeats: int) -> dict[str, Any]:
    """Measure, and write ``times.json`` after each task.

    A task that was measured with the same arms and rows is kept, as other times void the runs of equal time.
    """
    file = place.results / "times.json"
    report = {"tasks": {}, "machines": {}, "identities": {}} | (work.read(file) or {})
    peer.score_labels_alone()
    if not torch.cuda.is_available():
        memory.keep()
        bfloat16.speed_up()
    for task in tasks:
        identity = work.timed_identity(place, task, arms)
        if task in report["tasks"] and report["identities"].get(task) == identity:
            print(f"{task} was measured before and is kept; remove it from {file} to measure it again.", flush=True)
            continue
        report["tasks"][task] = _measured(place, task, arms, repeats)
        report["machines"][task] = measure.settings(repeats=repeats)
        report["identities"][task] = identity
        arguments.write_json(report, str(file))
    return report


def _measured(place: work.Place, task: str, arms: Sequence[str], repeats: int) -> dict[str, Any]:
    size = place.settings.rows_per_step(task)
    rows = work.parts(place, task).train[: size * (repeats + 1)]
    steps = {name: _step(place, place.settings.arms[name], rows, size) for name in arms}
    seconds = measure.alternate(steps, repeats, task)
    return {name: measure.summary(values) for name, values in seconds.items()}


def _step(place: work.Place, arm: Arm, rows: Sequence[Row], batch_size: int) -> Callable[[], None]:
    """A function that makes one training step after another."""
    settings = place.settings
    base, tokenizer = base_model.load(settings.base, dtype=settings.dtype)
    tokens: Dataset = token_rows(rows, tokenizer, None)[0]
    sft: Any = IcarusSFTConfig(
        output_dir=str(place.work / "times"),
        learning_rate=1e-3,
        max_steps=1000,
        per_device_train_batch_size=batch_size,
        dataloader_pin_memory=False,
    )
    kind: Any = IcarusSFTTrainer
    if arm.method == "lora":
        kind, tokens = SFTTrainer, tokens.select_columns(["input_ids", "labels"])
    attach = adapter.attach_conventional if arm.method == "lora" else adapter.attach
    model = attach(base, rank=arm.rank)
    trainer = kind(model=model, args=sft, train_dataset=tokens, processing_class=tokenizer)
    return stepping(trainer, len(rows) // batch_size)
