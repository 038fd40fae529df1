"""Forms of the decoder that only the experiment has."""

from __future__ import annotations

import torch
from torch import nn

from experiments.accuracy.forms import Extra


def test_a_small_gain_of_a_norm_acts_in_bfloat16() -> None:
    """Near 1 bfloat16 has steps of 0.004 and 0.008, so a gain that is rounded alone would be lost."""
    extra = Extra("norms", nn.RMSNorm(4096), 0)
    extra.gain.data.fill_(0.002)
    output = torch.randn(4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    changed = extra(output, output)
    assert changed.dtype == torch.bfloat16
    assert 0.001 < (changed.float().abs().sum() / output.float().abs().sum()).item() - 1 < 0.003
    assert torch.equal(output * (1 + extra.gain).to(torch.bfloat16), output)
