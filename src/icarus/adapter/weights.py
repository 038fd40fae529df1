"""The tensors of a LoRA adapter, of either kind, compared with its config and with the base model.

    values    each tensor has the name of half a pair, and holds finite floating point numbers
    pairs     both halves are there, fit together, and have the rank that the config says
    layout    each module is in the base model and has its shape there; none that is targeted is left out

No text here ends in a full stop: it is "reason; remedy".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from icarus.adapter import projections, settings
from icarus.adapter.files import WEIGHTS_NAME, Config, StrPath

Tensors = Mapping[str, Tensor]

PROJECTION = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
"""Name of a tensor of an ICaRus adapter."""

_OTHER_BASE = "use the one it was trained on"


@dataclass(frozen=True)
class Pair:
    """What an adapter has for one module."""

    module: str
    a: Tensor | None  # (rank, inputs)
    b: Tensor | None  # (outputs, rank)
    embedding: bool = False  # inputs are tokens, and the module's own weight is (inputs, outputs)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """That of the module's weight; None where a half is missing."""
        if self.a is None or self.b is None:
            return None
        outputs, inputs = self.b.shape[:1], self.a.shape[1:]
        return (*inputs, *outputs) if self.embedding else (*outputs, *inputs)


def pairs(tensors: Tensors, names: re.Pattern[str] = PROJECTION) -> list[Pair]:
    """In the order of the file; ``names`` has groups ``module``, ``half`` and perhaps ``embedding``."""
    halves: dict[tuple[str, bool], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := names.fullmatch(name):
            key = match["module"], bool(match.groupdict().get("embedding"))
            halves.setdefault(key, {})[match["half"]] = tensor
    return [Pair(module, found.get("A"), found.get("B"), embedding) for (module, embedding), found in halves.items()]


def value_problems(tensors: Tensors, names: re.Pattern[str] = PROJECTION) -> list[str]:
    """Tensors of foreign names, and values that no model can compute with."""
    if not tensors:
        return [f"{WEIGHTS_NAME} holds no tensors; save the adapter again"]
    found = []
    for name, tensor in tensors.items():
        if not names.fullmatch(name):
            found.append(f"{name} is not a LoRA weight (lora_A or lora_B of a projection); retrain without it")
        elif not tensor.is_floating_point():
            found.append(f"{name} holds {tensor.dtype} and not floating point numbers; save the adapter again")
        elif not torch.isfinite(tensor.float()).all():
            found.append(f"{name} holds NaN or infinity, so training diverged; retrain with a lower learning rate")
    return found


def pair_problem(pair: Pair, rank: int) -> str:
    """Why a pair is none, or not of this rank; empty for a sound one."""
    module, a, b = pair.module, pair.a, pair.b
    if a is None or b is None:
        return f"lora_{'A' if a is None else 'B'} of {module} is missing; copy or save the adapter again"
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        return f"the shapes {[*a.shape]} and {[*b.shape]} of {module} do not fit together; save it again"
    if a.shape[0] != rank:
        return f"{module} has rank {a.shape[0]} and the config says {rank}; save the adapter again"
    return ""


# ---------------------------------------------------------------------------------------------- layout


def descriptions(
    config: Config, base: nn.Module | StrPath, *, embeddings: bool = False
) -> Iterator[projections.Shapes]:
    """What a base model consists of, the cheapest description first. Raises InputError where it cannot be read.

    Of a folder those are its headers, and then a model without weights, where Transformers knows it: a checkpoint may
    have other names than the model, hold experts as separate matrices that the model holds as one, or be quantised.
    ``embeddings`` counts the embeddings of a model among its projections, as headers do anyway.
    """
    if isinstance(base, nn.Module):
        yield projections.of_model(base, embeddings=embeddings)
        return
    yield projections.of_checkpoint(base, transposed=bool(config.get("fan_in_fan_out")))
    if (shapes := projections.of_empty_model(base, embeddings=embeddings)) is not None:
        yield shapes


def misfit(pair: Pair, shapes: projections.Shapes) -> str:
    """Why a pair belongs to no module of the base model, or cannot; empty where it does."""
    wanted, has = shapes.get(pair.module), pair.shape
    if wanted is None:
        return f"it has weights for {pair.module}, which the base model lacks; {_OTHER_BASE}"
    if has is not None and has != wanted:
        return f"{pair.module} is {has} here and {wanted} in the base model; {_OTHER_BASE}"
    return ""


def missing(config: Config, pairs: Iterable[Pair], shapes: projections.Shapes) -> list[str]:
    """Modules that the config targets and the adapter has no weights for."""
    present = {pair.module for pair in pairs}
    absent = [module for module in shapes if module not in present and settings.targeted(config, module)]
    return [f"the weights of {module}, which target_modules names, are missing; save it again" for module in absent]
