"""Forms of the decoder that only the experiment has."""

from __future__ import annotations

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from experiments.accuracy.forms import Extra


def test_a_small_gain_of_a_norm_acts_in_bfloat16() -> None:
    """Near 1 bfloat16 has steps of 0.004 and 0.008, so a gain that is rounded by itself would be lost."""
    norm = LlamaRMSNorm(4096).bfloat16()
    extra = Extra("norms", norm, 0)
    read = torch.randn(4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    output = norm(read)
    torch.testing.assert_close(extra(output, read), output, rtol=2**-8, atol=0)  # it starts as the norm itself
    extra.gain.data.fill_(0.002)
    assert torch.equal(output * (1 + extra.gain).to(torch.bfloat16), output)
    changed = extra(output, read)
    assert changed.dtype == torch.bfloat16
    grown = changed.float().abs().sum() / output.float().abs().sum()
    assert 0.0015 < grown.item() - 1 < 0.0025
    assert [name for name, _ in extra.named_parameters()] == ["gain"]
