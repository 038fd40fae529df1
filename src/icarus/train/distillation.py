"""Distillation: a specialist learns the distributions of a conventional adapter, over the whole vocabulary."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from icarus.errors import InputError
from icarus.streams import IGNORED, Batch, TwoStreams
from icarus.train.config import IcarusDistillationConfig
from icarus.train.teacher import Teacher
from icarus.train.trainer import IcarusSFTTrainer

_CHUNK = 64
"""Rows whose distributions are in memory at once, in float32: 12 MiB each for a vocabulary of 49,152."""


class IcarusDistillationTrainer(IcarusSFTTrainer):
    """``IcarusSFTTrainer`` whose student learns from a conventional adapter of the same base model.

    Per token that carries loss: ``kd_ratio`` times the divergence from the teacher, and ``1 - kd_ratio`` times the
    cross-entropy of the label. Both are logged, as ``kd_loss`` and ``ce_loss``. The base weights are in memory once.

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

    def _prepare_model(self, model: nn.Module) -> None:
        self.teacher = Teacher(model, self._source)

    def _summed_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        logits, targets, rows = TwoStreams(model).predictions(batch)
        with self.accelerator.autocast():
            teacher = self.teacher.logits(batch, rows)
        divergence, cross_entropy = losses(logits, teacher, targets, self.args.temperature)
        self._record_parts(divergence.detach(), cross_entropy.detach(), targets)
        ratio = self.args.kd_ratio
        return ratio * divergence + (1 - ratio) * cross_entropy, logits, targets

    @torch.no_grad()
    def _record_parts(self, divergence: Tensor, cross_entropy: Tensor, targets: Tensor) -> None:
        sums = torch.stack([divergence, cross_entropy, (targets != IGNORED).sum()])
        divergence, cross_entropy, count = self.accelerator.gather_for_metrics(sums[None]).sum(0)
        metrics: defaultdict[str, list[float]] = self._metrics["train" if self.model.training else "eval"]
        metrics["kd_loss"].append(float(divergence / count.clamp(min=1)))
        metrics["ce_loss"].append(float(cross_entropy / count.clamp(min=1)))


def losses(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Sums over the rows with a target (B, R; -100 pads) of logits (B, R, V): divergence and cross-entropy, in nats.

    The divergence is KL(teacher || student) at the temperature, times its square so that the gradient keeps its size
    (Hinton et al., arXiv 1503.02531, section 2). Chunks of rows are computed again in the backward pass, so that beside
    the two logits nothing of their size is kept.
    """
    divergence = cross_entropy = student.new_zeros((), dtype=torch.float32)
    parts = (torch.split(part, _CHUNK) for part in (student.flatten(0, 1), teacher.flatten(0, 1), targets.flatten()))
    for chunk in zip(*parts, strict=True):
        one, other = checkpoint(_losses, *chunk, temperature, use_reentrant=False, preserve_rng_state=False)
        divergence, cross_entropy = divergence + one, cross_entropy + other
    return divergence, cross_entropy


def _losses(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Of one chunk: (N, V), (N, V), (N)."""
    own, its = ((part.float() / temperature).log_softmax(-1) for part in (student, teacher))
    per_row = F.kl_div(own, its, log_target=True, reduction="none").sum(-1)
    divergence = per_row.masked_fill(targets == IGNORED, 0).sum() * temperature**2
    return divergence, F.cross_entropy(student.float(), targets, ignore_index=IGNORED, reduction="sum")
