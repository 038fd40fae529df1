"""Train from a checkpoint on, or not at all where it is the last one.

Transformers checks for the end only after a step. So a run that was interrupted after its last checkpoint would take
one more step when it is resumed, and end with other weights.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def fit(trainer: Trainer, checkpoint: str | None) -> dict[str, float]:
    """Train, and return the trainer's metrics; with ``checkpoint`` from there on."""
    ended = _Ended()
    trainer.add_callback(ended)
    try:
        return dict(trainer.train(resume_from_checkpoint=checkpoint).metrics)
    except _EndedError:  # its weights are loaded
        trainer.control = trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        return {"train_loss": fmean(losses) if losses else float("nan")}
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
