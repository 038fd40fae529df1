"""One training run: by the product's code, or for a form that only the experiment has, by its trainer alone."""

from __future__ import annotations

import gc
import json
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from experiments.accuracy import forms, peer
from experiments.accuracy.settings import Arm, Settings
from icarus import adapter, base_model
from icarus.adapter.files import read_tensors
from icarus.streams import IGNORED, Batch, TwoStreams
from icarus.train.config import DistillConfig, IcarusDistillationConfig, IcarusSFTConfig, TrainConfig
from icarus.train.data import read, token_rows
from icarus.train.fit import fit
from icarus.train.run import last_checkpoint, run_directory, train
from icarus.train.trainer import Collator

_VALIDATIONS = 3
_BATCH = 8
_SAMPLED_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Training:
    """What one run is told."""

    arm: Arm
    base: str
    output: Path
    rows: Path
    validation: Path | None = None
    steps: int
    batch_size: int
    rate: float
    seed: int
    teacher: Path | None = None
    recompute: bool = False
    """Activations in the backward pass, which takes less memory and gives the same."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What came of it, besides the adapter."""

    seconds: float
    cpu_seconds: float
    """Of the processor: a run that had to share its core took longer."""
    peak_bytes: int
    """Of the process's memory, or of what torch had of the GPU's."""
    trainable: int
    """Parameters."""
    history: list[dict[str, Any]]
    """The trainer's log."""
    resumed: bool
    """Whether time and memory are those of the last start alone."""
    form: tuple[TwoStreams, Any] | None = None
    """Streams and tokenizer of a form, which is not written."""

    @property
    def tokens(self) -> int:
        """Of all rows that were trained on; a run that was resumed counts from 0 again."""
        total, last = 0, 0
        for count in (int(entry["num_tokens"]) for entry in self.history if "num_tokens" in entry):
            total, last = total + (last if count < last else 0), count
        return total + last

    def curve(self, key: str) -> list[list[float]]:
        """[step, loss], as the trainer logs it: the mean over the tokens of a batch, or over those of validation."""
        return [[entry["step"], round(entry[key], 5)] for entry in self.history if key in entry]


def run(settings: Settings, training: Training) -> Trained:
    """Train, and write the adapter unless it is a form's; who keeps the result removes the run's checkpoints."""
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
    resumed = last_checkpoint(training.output) is not None
    started, used = time.perf_counter(), time.process_time()
    form, history = _train_form(settings, training) if training.arm.in_process else (None, _train(settings, training))
    return Trained(
        seconds=round(time.perf_counter() - started, 1),
        cpu_seconds=round(time.process_time() - used, 1),
        peak_bytes=_peak_bytes(),
        trainable=_trainable(training.output, form),
        history=history,
        resumed=resumed,
        form=form,
    )


def device() -> str:
    """Where runs are made."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _peak_bytes() -> int:
    gc.collect()
    if device() == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _trainable(output: Path, form: tuple[TwoStreams, Any] | None) -> int:
    if form:
        return sum(parameter.numel() for parameter in form[0].model.parameters() if parameter.requires_grad)
    return sum(tensor.numel() for tensor in read_tensors(output).values())


def _train(settings: Settings, training: Training) -> list[dict[str, Any]]:
    """By ``icarus train`` or ``distill``, which resume from their own checkpoints."""
    arm = training.arm
    common: dict[str, Any] = {
        "base": training.base,
        "data": str(training.rows),
        "eval_data": str(training.validation) if training.validation else None,
        "output": str(training.output),
        "rank": arm.rank,
        "dtype": settings.dtype,
        "resume": last_checkpoint(training.output) is not None,
    }
    trainer = _trainer_settings(training)
    if training.teacher:
        if arm.lmbda is not None:
            trainer |= {"lmbda": arm.lmbda, "max_completion_length": _SAMPLED_TOKENS}
        train(DistillConfig(teacher=str(training.teacher), **common), IcarusDistillationConfig(**trainer))
    else:
        peer.score_labels_alone()
        method: Any = "lora" if arm.method == "lora" else "icarus"
        train(TrainConfig(method=method, **common), IcarusSFTConfig(**trainer))
    state = Path(str(last_checkpoint(training.output))) / "trainer_state.json"
    history: list[dict[str, Any]] = json.loads(state.read_text())["log_history"]
    return history


def _trainer_settings(training: Training) -> dict[str, Any]:
    every = -(-training.steps // _VALIDATIONS)
    return {
        "output_dir": None,
        "learning_rate": training.rate,
        "max_steps": training.steps,
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": _BATCH,
        "train_sampling_strategy": "group_by_length",  # less padding, the same for all arms
        "gradient_checkpointing": training.recompute,
        "seed": training.seed,
        "data_seed": training.seed,
        "eval_strategy": "steps" if training.validation else "no",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 1,
        "logging_steps": 5,
        "disable_tqdm": True,
    }


def _train_form(settings: Settings, training: Training) -> tuple[tuple[TwoStreams, Any], list[dict[str, Any]]]:
    arm = training.arm
    model, codes = base_model.load(training.base, dtype=settings.dtype)
    torch.manual_seed(training.seed)
    adapted = adapter.attach(model, _lora(arm, model))
    if arm.form:
        forms.add(adapted, arm.form, arm.form_rank or arm.rank)
    changed = {"output_dir": str(run_directory(training.output)), "dataloader_pin_memory": False}
    trainer = forms.FormTrainer(
        adapted,
        IcarusSFTConfig(**_trainer_settings(training) | changed),
        train_dataset=token_rows(read(str(training.rows)), codes, None)[0],
        eval_dataset=token_rows(read(str(training.validation)), codes, None)[0] if training.validation else None,
        processing_class=codes,
    )
    fit(trainer, last_checkpoint(training.output))
    adapted.eval()
    return (forms.FormStreams(adapted), codes), trainer.state.log_history


def _lora(arm: Arm, model: Any) -> LoraConfig:
    ranks = arm.ranks or {}
    return LoraConfig(
        r=arm.rank,
        lora_alpha=2 * arm.rank,
        rank_pattern=ranks,
        alpha_pattern={name: 2 * rank for name, rank in ranks.items()},
        target_modules=adapter.decoder_targets(model),
        task_type="CAUSAL_LM",
    )


@torch.no_grad()
def form_loss(form: tuple[TwoStreams, Any], rows: Sequence[dict[str, Any]]) -> float:
    """Mean over all tokens of rows that carry loss, in nats."""
    streams, codes = form
    tokens = sorted(token_rows(rows, codes, None)[0], key=lambda row: len(row["input_ids"]))
    device, collate, total, count = next(streams.model.parameters()).device, Collator(0), 0.0, 0
    for start in range(0, len(tokens), _BATCH):
        columns = collate(tokens[start : start + _BATCH])
        loss, _, targets = streams.loss(Batch.of(**{name: values.to(device) for name, values in columns.items()}))
        total, count = total + float(loss), count + int((targets != IGNORED).sum())
    return total / count
