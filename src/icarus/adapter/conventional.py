"""Reading and checking a conventional adapter: a LoRA without the ICaRus marker, which writes a KV cache of its own.

A server keeps that cache in the pool in which everybody's is, and vLLM applies what it finds a place for: it copies
smaller matrices into larger ones, and leaves out modules that it does not know. So such an adapter is held to what
ICaRus adapters are held to, as far as vLLM does not serve more: K and V, embeddings, the head and experts may be
adapted, targets may have vLLM's names for fused projections, and weights may be pickles without code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from icarus.adapter import settings, weights
from icarus.adapter.files import Config, StrPath, read_config, served_tensors
from icarus.adapter.projections import Shapes
from icarus.adapter.settings import short, shown
from icarus.errors import AdapterError

HEADS = {"classifier", "score"}
"""Modules that a classification model may have saved in full."""

_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<half>[AB])(?(embedding)|\.weight)"
)
_IGNORED = re.compile(r".*\.(embed_tokens|lm_head)\.base_layer\.weight")  # copies of base weights, which vLLM skips
_HEAD = re.compile(rf".*\b({'|'.join(HEADS)})\.(weight|bias)")
_EXPERTS = re.compile(r"(?P<all>.+\.experts)(\.(base_layer|w[123]))?")  # of all experts in one: ranks times experts
_EMBEDDINGS = {"embed_tokens", "word_embeddings", "wte", "embed_in"}
_COMPOSITE = {"text_config", "llm_config", "language_config", "thinker_config"}
_LORA_GA = "lora_ga"  # changes the base weights while it trains, and puts them back


@dataclass(frozen=True)
class ConventionalInfo:
    """What a sound conventional adapter holds."""

    directory: Path
    rank: int  # the highest that a server must have room for
    targets: tuple[str, ...]  # last names of the adapted modules, sorted
    bytes: int  # of all tensors
    patterns: tuple[str, ...] = ()  # of rank_pattern and alpha_pattern, those that it uses


def verify_conventional(directory: StrPath, base: StrPath | None = None, *, heads: bool = False) -> ConventionalInfo:
    """Check that vLLM can serve a conventional adapter as its trainer meant it; see ``conventional_problems``.

    Raises:
        AdapterError: it is refused; the message has the first reason with its remedy, and the number of further ones.
        InputError: ``base`` cannot be read.
    """
    refusals, config, tensors = _inspect(Path(directory), base, heads)
    if refusals:
        more = f" ({len(refusals) - 1} more problems; see `icarus verify`)" if len(refusals) > 1 else ""
        raise AdapterError(f"{directory}: {refusals[0]}.{more}")
    return ConventionalInfo(
        directory=Path(directory),
        rank=settings.highest_rank(config),
        targets=tuple(sorted({pair.module.rpartition(".")[2] for pair in weights.pairs(tensors, _NAME)})),
        bytes=sum(tensor.bytes for tensor in tensors.values()),
        patterns=tuple(settings.patterns_in(config)),
    )


def conventional_problems(directory: StrPath, base: StrPath | None = None, *, heads: bool = False) -> list[str]:
    """All reasons not to serve a conventional adapter, the weightiest first; empty for a sound one.

    Checked: files, settings, tensors (names, halves, shapes, rank, finite values), and with ``base``, a folder of
    safetensors, that each module is there, has its shape, and is left out by neither the config nor the file. Of a base
    model whose parts have several names (a language model within a multimodal one) names are left to vLLM. ``heads``
    lets an adapter of a classification model bring its head.

    Raises:
        InputError: ``base`` cannot be read.
    """
    return _inspect(Path(directory), base, heads)[0]


def _inspect(directory: Path, base: StrPath | None, heads: bool) -> tuple[list[str], Config, weights.Tensors]:
    try:
        config = read_config(directory)
    except AdapterError as error:
        return [str(error)], {}, {}
    refusals: list[str] = []
    try:
        malformed = settings.malformed(config) or _no_targets(config)
        refusals += malformed or _setting_problems(config, heads)
        tensors = _applied(served_tensors(directory), heads)
        if tensors or not heads:
            refusals += weights.name_problems(tensors, _NAME)
        if not malformed:  # else there is nothing to compare the tensors with
            config["target_modules"] = config["target_modules"] or []
            refusals += _tensor_problems(config, tensors, base)
    except AdapterError as error:
        return [*refusals, str(error)], config, {}
    except TimeoutError:
        return [*refusals, settings.SLOW], config, {}
    return refusals, config, tensors


def _applied(tensors: weights.Tensors, heads: bool) -> weights.Tensors:
    """Those that vLLM makes LoRA of."""
    skipped = [_IGNORED, _HEAD] if heads else [_IGNORED]
    return {name: tensor for name, tensor in tensors.items() if not any(skip.fullmatch(name) for skip in skipped)}


# ---------------------------------------------------------------------------------------------- the config


def _no_targets(config: Config) -> list[str]:
    """vLLM wants the field and reads the modules from the tensors, which ``target_parameters`` may have named."""
    if config.get("target_modules") or ("target_modules" in config and config.get("target_parameters")):
        return []
    return ["target_modules names no modules; save the adapter again"]


def _setting_problems(config: Config, heads: bool) -> list[str]:
    refusals = []
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        refusals.append(f"peft_type is {short(kind)}, and vLLM serves LoRA; retrain with 'LORA'")
    saved = config.get("modules_to_save") or []
    if saved and not (heads and isinstance(saved, list) and set(map(str, saved)) <= HEADS):
        refusals.append(f"modules_to_save is {short(saved)}, and vLLM serves LoRA weights alone; retrain without it")
    refusals += settings.variant_problems(config) + settings.init_problems(config, {_LORA_GA})
    for alpha in settings.alphas(config):
        if not settings.is_number(alpha):
            refusals.append(f"lora_alpha is {short(alpha)}; set it to a finite number")
    unset = [flag for flag in ("use_rslora", "fan_in_fan_out") if config.get(flag) is not None]
    return refusals + settings.flag_problems(config, unset)


# ---------------------------------------------------------------------------------------------- the tensors


def _tensor_problems(config: Config, tensors: weights.Tensors, base: StrPath | None) -> list[str]:
    pairs = weights.pairs(tensors, _NAME)
    single = [pair for pair in pairs if not _EXPERTS.fullmatch(pair.module)]
    return weights.compared(
        config,
        pairs,
        lambda pair: _pair_problem(pair, config),
        lambda: [] if base is None else _layout_problems(config, single, base),
    )


def _pair_problem(pair: weights.Pair, config: Config) -> str:
    if _EXPERTS.fullmatch(pair.module):
        return ""
    leaf = pair.module.rpartition(".")[2]
    if leaf in _EMBEDDINGS and not pair.embedding:
        return f"{shown(pair.module)} is an embedding, whose weights are lora_embedding_A and _B; save it again"
    return weights.pair_problem(pair, settings.rank_of(config, pair.module))


def _layout_problems(config: Config, pairs: list[weights.Pair], base: StrPath) -> list[str]:
    seen: list[Shapes] = []
    misfits, absent = pairs, list[str]()
    for shapes in weights.descriptions(config, base, embeddings=True):
        seen.append(shapes)
        misfits = [pair for pair in misfits if weights.misfit(pair, shapes)]
        absent = weights.missing(config, pairs, shapes)
        if not misfits and not absent:
            break
    kind, known = _base_config(Path(base)), len(seen) > 1  # by Transformers: else headers are all there is
    if not known and "quantization_config" in kind:
        return []
    if _COMPOSITE & kind.keys():
        return [weights.misfit(pair, seen[-1]) for pair in misfits if pair.module in seen[-1]]
    problems = [weights.misfit(pair, seen[-1]) for pair in misfits]
    if _understood(config, {module for shapes in seen for module in shapes}):
        problems += [*_strays(config, pairs), *(absent if known else [])]
    return problems


def _strays(config: Config, pairs: list[weights.Pair]) -> list[str]:
    parameters = config.get("target_parameters") or []
    strays = [
        shown(pair.module)
        for pair in pairs
        if not settings.targeted(config, pair.module) and not settings.matches(parameters, f"{pair.module}.weight")
    ]
    return [f"it has weights for {module}, which target_modules does not name; save it again" for module in strays]


def _understood(config: Config, modules: Iterable[str]) -> bool:
    """Whether the targets mean modules of the base model, and none may be vLLM's name for several of them in one.

    Such a name (qkv_proj, gate_up_proj) is none of the base model's, and has a part that theirs have.
    """
    targets = config["target_modules"]
    if isinstance(targets, str):
        return targets.lower() != settings.ALL_LINEAR
    ends = {module[start:] for module in modules for start in _starts(module)}
    parts = {part for module in modules for part in _parts(module)}
    return bool(targets) and all(parts.isdisjoint(_parts(target)) for target in set(targets) - ends)


def _parts(module: str) -> list[str]:
    return module.rpartition(".")[2].split("_")


def _starts(module: str) -> list[int]:
    return [0, *(dot.end() for dot in re.finditer(r"\.", module))]


def _base_config(base: Path) -> dict[str, object]:
    try:
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
