"""The linear projections of a base model, by name: from a loaded model, or from its folder without loading a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from icarus.adapter.files import StrPath
from icarus.adapter.fingerprints import base_of, checkpoint_shapes

Shapes = dict[str, tuple[int, int]]
"""Module name to (out features, in features)."""


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Linear modules (also GPT-2's Conv1D) by the names that they have without adapters."""
    projections = {}
    for name, module in base_of(model).named_modules():
        inner = getattr(module, "base_layer", module)
        linear = isinstance(inner, nn.Linear) or type(inner).__name__ == "Conv1D"
        if linear and ".lora_" not in name and not name.endswith(".base_layer"):
            projections[name] = inner
    return projections


def of_model(model: nn.Module, *, embeddings: bool = False) -> Shapes:
    """From the modules of a loaded model, with or without adapters; ``embeddings`` are (tokens, features)."""
    shapes = {}
    for name, module in linears(model).items():
        if isinstance(module, nn.Linear):
            shapes[name] = module.out_features, module.in_features
        else:
            inputs, outputs = module.get_parameter("weight").shape  # Conv1D stores its transpose
            shapes[name] = outputs, inputs
    if embeddings:
        tables = {name: module for name, module in base_of(model).named_modules() if isinstance(module, nn.Embedding)}
        shapes |= {name: (table.num_embeddings, table.embedding_dim) for name, table in tables.items()}
    return shapes


def of_checkpoint(folder: StrPath, *, transposed: bool) -> Shapes:
    """From the headers of a checkpoint: every matrix, by its name there; ``transposed`` if it stores inputs first.

    Raises:
        InputError: the checkpoint is missing or damaged.
    """
    stored = {name: s for name, s in checkpoint_shapes(folder).items() if name.endswith(".weight") and len(s) == 2}
    return {name.removesuffix(".weight"): (b, a) if transposed else (a, b) for name, (a, b) in stored.items()}


def of_empty_model(folder: StrPath, *, embeddings: bool = False) -> Shapes | None:
    """From a model without weights; None where Transformers does not know the model.

    For checkpoints with other names than the model's, or with an expert a matrix where the model holds all in one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            auto: Any = AutoModelForCausalLM  # untyped
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            return of_model(auto.from_config(config, trust_remote_code=False), embeddings=embeddings)
    except (OSError, ValueError, KeyError):
        return None
