"""Train from a checkpoint on, or not at all where it is the last one.

Transformers checks for the end only after a step. So a run that was interrupted after its last checkpoint would take
one more step when it is resumed, and end with other weights.
"""

from __future__ import annotations

import sys
import time
from statistics import fmean
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def fit(trainer: Trainer, checkpoint: str | None) -> dict[str, float]:
    """Train, with ``checkpoint`` from there on; returns its metrics, of a run that had ended the mean loss."""
    if checkpoint is None:
        return dict(trainer.train().metrics)
    ended = _Ended()
    trainer.add_callback(ended)
    try:
        return dict(trainer.train(resume_from_checkpoint=checkpoint).metrics)
    except _EndedError:  # its weights are loaded
        if trainer.is_world_process_zero():
            steps = trainer.state.global_step
            print(f"The run had ended after {steps} steps; what it learnt is written again.", file=sys.stderr)
        losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        end: Any = trainer._finalize_training  # of every run: its best checkpoint, callbacks
        end(None, 0, time.time())
        return {"train_loss": fmean(losses)} if losses else {}
    finally:
        trainer.remove_callback(ended)


class _EndedError(Exception):
    """The checkpoint has all steps."""


class _Ended(TrainerCallback):
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            raise _EndedError
