"""Steps of a trainer one by one, for measurements that alternate between several."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, islice
from typing import Any


def stepping(trainer: Any, batches: int) -> Callable[[], None]:
    """A function that makes one training step after another on the first batches: what Trainer does, and no logs."""
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # set by Trainer's loop, read by its training_step
    trainer.model.train()
    kept = cycle(list(islice(trainer.get_train_dataloader(), batches)))

    def step() -> None:
        trainer.training_step(trainer.model, dict(next(kept)))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step
