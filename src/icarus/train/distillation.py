"""Distillation: a specialist learns the distributions of a conventional adapter, over the whole vocabulary."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from icarus.errors import InputError
from icarus.streams import IGNORED, Batch, TwoStreams
from icarus.train import own_answers, tokenizer
from icarus.train.config import IcarusDistillationConfig
from icarus.train.teacher import Teacher
from icarus.train.trainer import IcarusSFTTrainer

Inputs = dict[str, Tensor]

_SAMPLED = "sampled"
"""In the inputs of batches whose answers are the student's."""
_CHUNK = 64
"""Rows whose distributions are in memory at once, in float32: 12 MiB each for a vocabulary of 49,152."""


class IcarusDistillationTrainer(IcarusSFTTrainer):
    """``IcarusSFTTrainer`` whose student learns from a conventional adapter of the same base model.

    Per token that carries loss: ``kd_ratio`` times the divergence from the teacher, and ``1 - kd_ratio`` times the
    cross-entropy of the label. Both are logged, as ``kd_loss`` and ``ce_loss``. In a share ``lmbda`` of the batches the
    student samples the last answer of each row; that has no labels, so the divergence alone counts. The base weights
    are in memory once.

    Args:
        model: as ``IcarusSFTTrainer`` has it: the student.
        teacher_model: folder or Hub id of a conventional adapter.
        args: settings.
        kwargs: as ``IcarusSFTTrainer`` has them.

    Raises:
        InputError: the teacher cannot be used; the message names it.
    """

    def __init__(
        self,
        model: str | nn.Module,
        teacher_model: str | Path,
        args: IcarusDistillationConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, IcarusDistillationConfig):
            raise InputError("IcarusDistillationTrainer needs its settings; give args=IcarusDistillationConfig(...).")
        self._source = teacher_model
        super().__init__(model, args, **kwargs)
        self.teacher.model.to(self.accelerator.device)
        own = [] if self.processing_class.eos_token_id is None else [self.processing_class.eos_token_id]
        self._answer_ends = {
            *tokenizer.ends(self.accelerator.unwrap_model(self.model), self.processing_class, args),
            *own,
        }

    def _prepare_model(self, model: nn.Module) -> None:
        self.teacher = Teacher(model, self._source)

    def get_batch_samples(self, epoch_iterator: Iterator[Inputs], num_batches: int, device: torch.device) -> Any:
        """Transformers' batches of one step and their count of tokens with loss, after the student has sampled."""
        batches = (self._perhaps_sampled(number, batch) for number, batch in enumerate(epoch_iterator))
        return super().get_batch_samples(batches, num_batches, device)

    def _perhaps_sampled(self, number: int, batch: Inputs) -> Inputs:
        """The batch of that number within its step; draws depend on these alone, so that a resumed run draws alike."""
        drawn = (self.args.seed, self.state.global_step, number)
        if random.Random(hash(drawn)).random() >= self.args.lmbda:  # the same in all processes
            return batch
        if "branch_ids" in batch and bool(batch["branch_ids"].any()):
            raise InputError("lmbda and several completions of one prompt cannot be combined; give one row each.")
        device, longest = self.accelerator.device, self._given.max_length
        asked = own_answers.prompts(batch["labels"], batch["input_ids"], batch["attention_mask"])
        answers = own_answers.sample(
            TwoStreams(self.accelerator.unwrap_model(self.model)),
            self.adapter_name,
            asked,
            ends=self._answer_ends,
            max_new_tokens=self.args.max_completion_length,
            temperature=self.args.temperature,
            generator=torch.Generator(device).manual_seed(hash((*drawn, self.args.process_index))),
        )
        rows = [
            {"input_ids": [*prompt, *answer][:longest], "labels": [*[IGNORED] * len(prompt), *answer][:longest]}
            for prompt, answer in zip(asked, answers, strict=True)
        ]
        inputs = {name: tensor.to(device) for name, tensor in self.data_collator(rows).items()}
        return inputs | {_SAMPLED: torch.ones(len(rows), dtype=torch.bool, device=device)}

    def _summed_loss(
        self, model: nn.Module, batch: Batch, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, targets, rows = TwoStreams(model).predictions(batch)
        with self.accelerator.autocast():
            teacher = self.teacher.logits(batch, rows)
        divergence, cross_entropy = losses(
            logits, teacher, targets, beta=self.args.beta, temperature=self.args.temperature
        )
        sampled = _SAMPLED in inputs
        parts = {"kd_loss": divergence} if sampled else {"kd_loss": divergence, "ce_loss": cross_entropy}
        self._record_parts(parts, targets)
        ratio = 1.0 if sampled else self.args.kd_ratio
        return ratio * divergence + (1 - ratio) * cross_entropy, logits, targets

    @torch.no_grad()
    def _record_parts(self, parts: Mapping[str, Tensor], targets: Tensor) -> None:
        sums = torch.stack([*(part.detach() for part in parts.values()), (targets != IGNORED).sum()])
        *totals, count = self.accelerator.gather_for_metrics(sums[None]).sum(0).tolist()
        metrics: defaultdict[str, list[float]] = self._metrics["train" if self.model.training else "eval"]
        for name, total in zip(parts, totals, strict=True):
            metrics[name].append(total / max(count, 1))


def losses(
    student: Tensor, teacher: Tensor, targets: Tensor, *, beta: float = 0.0, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Sums over the rows with a target (B, R; -100 pads) of logits (B, R, V): divergence and cross-entropy, in nats.

    The divergence is that of ``beta`` (``_divergence``) at the temperature, times its square so that the gradient keeps
    its size (Hinton et al., arXiv 1503.02531, section 2). Chunks of rows are computed again in the backward pass, so
    that beside the two logits nothing of their size is kept.
    """
    divergence = cross_entropy = student.new_zeros((), dtype=torch.float32)
    parts = (torch.split(part, _CHUNK) for part in (student.flatten(0, 1), teacher.flatten(0, 1), targets.flatten()))
    for chunk in zip(*parts, strict=True):
        one, other = checkpoint(_losses, *chunk, beta, temperature, use_reentrant=False, preserve_rng_state=False)
        divergence, cross_entropy = divergence + one, cross_entropy + other
    return divergence, cross_entropy


def _losses(
    student: Tensor, teacher: Tensor, targets: Tensor, beta: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Of one chunk: (N, V), (N, V), (N)."""
    own, its = ((part.float() / temperature).log_softmax(-1) for part in (student, teacher))
    divergence = _divergence(own, its, beta).masked_fill(targets == IGNORED, 0).sum() * temperature**2
    return divergence, F.cross_entropy(student.float(), targets, ignore_index=IGNORED, reduction="sum")


def _divergence(own: Tensor, its: Tensor, beta: float) -> Tensor:
    """Generalized Jensen-Shannon divergence of log-probabilities (N, V) as TRL has it (Agarwal et al., 2306.13649).

    ``beta`` 0 is KL(teacher || student), 1 is KL(student || teacher).
    """
    if beta in (0, 1):
        return _kl(its, own) if beta == 0 else _kl(own, its)
    mixed = torch.logaddexp(own + math.log1p(-beta), its + math.log(beta))
    return beta * _kl(its, mixed) + (1 - beta) * _kl(own, mixed)


def _kl(one: Tensor, other: Tensor) -> Tensor:
    """KL(one || other) of log-probabilities, by row."""
    return F.kl_div(other, one, log_target=True, reduction="none").sum(-1)
