"""What TRL's trainer is told on a CPU, so that ordinary LoRA is timed at its best."""

from __future__ import annotations

import torch
from trl.trainer import utils


def score_labels_alone() -> None:
    """Let TRL's fused lm_head compute the rows that carry loss alone, as it does on GPUs.

    Without Triton it computes those of the prompt as well and masks them (trl/trainer/utils.py, ``compact``), which
    takes nearly half of a step here. Losses and gradients are the same.
    """
    if not torch.cuda.is_available():
        utils._use_triton = lambda device: True
