"""The tensors of a LoRA adapter, of either kind, compared with its config and with the base model.

    names     each tensor has the name of half a pair
    pairs     both halves are there, fit together, and have the rank that the config says
    layout    each module is in the base model and has its shape there; none that is targeted is left out
    values    they are finite floating point numbers; read last, and of tensors alone that nothing speaks against

No text here ends in a full stop: it is "reason; remedy".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from icarus.adapter import projections, settings
from icarus.adapter.files import WEIGHTS_NAME, Config, StrPath
from icarus.adapter.settings import shown
from icarus.adapter.stored import Stored

Tensors = Mapping[str, Stored]

PROJECTION = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
"""Name of a tensor of an ICaRus adapter."""

_OTHER_BASE = "use the one it was trained on"


@dataclass(frozen=True)
class Pair:
    """What an adapter has for one module."""

    module: str
    a: Stored | None  # (rank, inputs)
    b: Stored | None  # (outputs, rank)
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
    halves: dict[tuple[str, bool], dict[str, Stored]] = {}
    for name, tensor in tensors.items():
        if match := names.fullmatch(name):
            key = match["module"], bool(match.groupdict().get("embedding"))
            halves.setdefault(key, {})[match["half"]] = tensor
    return [Pair(module, half.get("A"), half.get("B"), embedding) for (module, embedding), half in halves.items()]


def name_problems(tensors: Tensors, names: re.Pattern[str] = PROJECTION) -> list[str]:
    """Tensors that do not belong to a LoRA."""
    if not tensors:
        return [f"{WEIGHTS_NAME} holds no tensors; save the adapter again"]
    foreign = [name for name in tensors if not names.fullmatch(name)]
    return [
        f"{shown(name)} is not a LoRA weight (lora_A or lora_B of a projection); retrain without it" for name in foreign
    ]


def value_problem(tensor: Stored, scale: float = 1.0) -> str:
    """Why no model can compute with the values, also times ``scale``; empty where it can. Reads them."""
    name = shown(tensor.name)
    if not tensor.floating:
        return f"{name} holds {tensor.dtype} and not floating point numbers; save the adapter again"
    try:
        peaks = [float(piece.float().abs().max()) for piece in tensor.pieces()]
    except (OSError, ValueError, RuntimeError) as error:
        return f"{name} cannot be read ({error}); copy or save the adapter again"
    if not all(map(math.isfinite, peaks)):
        return f"{name} holds NaN or infinity, so training diverged; retrain with a lower learning rate"
    if max(peaks, default=0.0) * abs(scale) > torch.finfo(torch.float32).max:
        return f"{name} times its scale is more than float32 holds; retrain with a smaller lora_alpha"
    return ""


def pair_problem(pair: Pair, rank: int) -> str:
    """Why two halves are not a pair, or not of this rank; empty for a sound one."""
    module, a, b = shown(pair.module), pair.a, pair.b
    if a is None or b is None:
        return f"lora_{'A' if a is None else 'B'} of {module} is missing; copy or save the adapter again"
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        return f"the shapes {[*a.shape]} and {[*b.shape]} of {module} do not fit together; save it again"
    if a.shape[0] != rank:
        return f"{module} has rank {a.shape[0]} and the config says {rank}; save the adapter again"
    if rank > max(a.shape[1], b.shape[0]):
        return f"{module} has rank {rank}, which is more than it has inputs or outputs; save the adapter again"
    return ""


def compared(
    config: Config,
    pairs: Iterable[Pair],
    pair_problem: Callable[[Pair], str],
    layout_problems: Callable[[], list[str]],
) -> list[str]:
    """Problems of pairs and layout, and then those of the values that it still makes sense to read."""
    judged = [(pair, pair_problem(pair)) for pair in pairs]
    refusals = [problem for _, problem in judged if problem]
    if layout := layout_problems():
        return refusals + layout
    sound = [pair for pair, problem in judged if not problem]
    halves = [(half, 1.0) for pair in sound if (half := pair.a)]
    halves += [(half, settings.scale_of(config, pair.module)) for pair in sound if (half := pair.b)]
    return refusals + [problem for half, scale in halves if (problem := value_problem(half, scale))]


# ---------------------------------------------------------------------------------------------- layout


def descriptions(
    config: Config, base: nn.Module | StrPath, *, embeddings: bool = False
) -> Iterator[projections.Shapes]:
    """What a base model consists of, the cheapest description first.

    Of a folder those are its headers, and then a model without weights, where Transformers knows it: a checkpoint may
    have other names than the model, hold experts as separate matrices that the model holds as one, or be quantised.
    ``embeddings`` counts the embeddings of a model among its projections, as headers do anyway.

    Raises:
        InputError: the base model cannot be read.
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
        return f"it has weights for {shown(pair.module)}, which the base model lacks; {_OTHER_BASE}"
    if has is not None and has != wanted:
        return f"{shown(pair.module)} is {has} here and {wanted} in the base model; {_OTHER_BASE}"
    return ""


def missing(config: Config, pairs: Iterable[Pair], shapes: projections.Shapes) -> list[str]:
    """Modules that the config targets and the adapter has no weights for."""
    present = {pair.module for pair in pairs}
    absent = [module for module in shapes if module not in present and settings.targeted(config, module)]
    return [f"the weights of {module}, which target_modules names, are missing; save it again" for module in absent]
