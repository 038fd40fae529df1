"""What a person sees of a training run: a bar with loss, tokens/s and time left; plain lines without a screen."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Progress(TrainerCallback):
    """Replaces Transformers' bar, which knows neither loss nor speed."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None
        self.started, self.steps_before = 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started, self.steps_before = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                dynamic_ncols=True,
                disable=args.disable_tqdm or not sys.stderr.isatty(),
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.bar is None or not logs or "train_runtime" in logs:
            return
        shown: dict[str, float] = {
            name: logs[name]
            for name in ("loss", "kd_loss", "ce_loss", "eval_loss", "mean_token_accuracy")
            if name in logs
        }
        seconds = max(time.monotonic() - self.started, 1e-9)
        if "num_tokens" in logs:
            shown["tokens/s"] = round(logs["num_tokens"] / seconds)
        if not self.bar.disable:
            self.bar.set_postfix(shown)
            return
        done = state.global_step - self.steps_before
        left = (state.max_steps - state.global_step) * seconds / max(done, 1)
        figures = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        print(f"step {state.global_step}/{state.max_steps}: {figures}, {left:.0f} s left", file=sys.stderr, flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()
