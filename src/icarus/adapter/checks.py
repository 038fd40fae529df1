"""Reading and checking an adapter directory: may this adapter share a KV cache?

An ICaRus adapter is a PEFT LoRA directory (``adapter_config.json``, ``adapter_model.safetensors``, ``README.md``)
without any projection that feeds K or V, and with ``"icarus": {"version": 1, "base_fingerprint": "<hex>"}`` in its
config. Nothing here needs PEFT and, but for ``projections.of_empty_model``, nothing needs Transformers. Adapters
without the marker are checked in ``conventional``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from icarus.adapter import settings, weights
from icarus.adapter.files import MARKER_VERSION, Config, StrPath, read_config, stored_tensors
from icarus.adapter.fingerprints import fingerprint
from icarus.adapter.settings import short, shown
from icarus.errors import AdapterError

Base = nn.Module | StrPath | None  # loaded, its safetensors folder, or nothing to compare with

# Parts of a projection's name that say it writes K, V or the state of a recurrent layer, which is a cache as well.
_KV_PARTS = {"k", "v", "kv", "qk", "qkv", "gqkv", "qkvz", "wk", "wv", "wkv", "wqkv", "key", "value"}
_KV_NAMES = {"c_attn", "w_pack", "att_proj", "a_proj", "b_proj", "f_a_proj", "f_b_proj", "x_proj", "dt_proj"}
_KV_PROBES = [f"model.layers.0.self_attn.{leaf}" for leaf in ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")]
_KV_PREFIX = "in_proj"  # fused projections of attention and of recurrent layers: in_proj, in_proj_qkvz, in_proj_ba

_FLAGS = "use_rslora fan_in_fan_out inference_mode use_dora use_qalora lora_bias ensure_weight_tying".split()


@dataclass(frozen=True)
class AdapterInfo:
    """What a verified adapter directory holds."""

    directory: Path
    base_model: str | None  # name or path of the base model, as its trainer gave it
    rank: int  # the highest that a server must have room for
    alpha: float
    targets: tuple[str, ...]  # last names of the adapted modules, sorted
    base_fingerprint: str
    tensors: int
    bytes: int  # of all tensors
    patterns: tuple[str, ...] = ()  # of rank_pattern and alpha_pattern, those that it uses


def feeds_kv(module_name: str) -> bool:
    """Whether a module of this (dotted) name writes K, V or recurrent state, alone or fused with others."""
    leaf = module_name.rpartition(".")[2].lower()
    parts = re.split(r"[^a-z0-9]+", leaf)
    return leaf in _KV_NAMES or leaf.startswith(_KV_PREFIX) or not _KV_PARTS.isdisjoint(parts)


def verify(directory: StrPath, base: Base = None, *, base_fingerprint: str | None = None) -> AdapterInfo:
    """Check that an adapter is sound and may share a KV cache; see ``problems`` for what is checked and how.

    Raises:
        AdapterError: it is refused; the message has the first reason with its remedy, and the number of further ones.
        InputError: ``base`` cannot be read.
    """
    refusals, config, tensors = _inspect(Path(directory), base, base_fingerprint)
    if refusals:
        more = f" ({len(refusals) - 1} more problems; see `icarus verify`)" if len(refusals) > 1 else ""
        raise AdapterError(f"{directory}: {refusals[0]}.{more}")
    return AdapterInfo(
        directory=Path(directory),
        base_model=config.get("base_model_name_or_path"),
        rank=settings.highest_rank(config),
        alpha=float(config["lora_alpha"]),
        targets=tuple(sorted({pair.module.rpartition(".")[2] for pair in weights.pairs(tensors)})),
        base_fingerprint=config["icarus"]["base_fingerprint"],
        tensors=len(tensors),
        bytes=sum(tensor.bytes for tensor in tensors.values()),
        patterns=tuple(settings.patterns_in(config)),
    )


def problems(directory: StrPath, base: Base = None, *, base_fingerprint: str | None = None) -> list[str]:
    """All reasons to refuse an adapter directory, the weightiest first; empty for a sound one.

    Checked: files, config, marker, settings, targets (by config and by tensor names), tensors (halves, shapes, rank,
    finite values).

    Args:
        directory: the adapter's.
        base: a loaded model or its safetensors folder. With it the tensors must be exactly those of the modules that
            the targets name there, and the fingerprints must agree.
        base_fingerprint: that of ``base``, where it is known, which saves hashing.

    Raises:
        InputError: ``base`` cannot be read.
    """
    return _inspect(Path(directory), base, base_fingerprint)[0]


def _inspect(directory: Path, base: Base, mark: str | None) -> tuple[list[str], Config, weights.Tensors]:
    try:
        config = read_config(directory)
    except AdapterError as error:
        return [str(error)], {}, {}
    refusals = _marker_problems(config)
    try:
        refusals += (malformed := settings.malformed(config) or _no_targets(config)) or _config_problems(config)
        tensors = stored_tensors(directory)
        refusals += weights.name_problems(tensors)
        if not malformed:  # else there is nothing to compare the tensors with
            refusals += _tensor_problems(config, tensors, base, mark)
    except AdapterError as error:
        return [*refusals, str(error)], config, {}
    except TimeoutError:
        return [*refusals, settings.SLOW], config, {}
    return refusals, config, tensors


def _config_problems(config: Config) -> list[str]:
    return setting_problems(config) + _target_problems(config)


def _tensor_problems(config: Config, tensors: weights.Tensors, base: Base, mark: str | None) -> list[str]:
    pairs = weights.pairs(tensors)
    if mark is None and base is not None:
        mark = fingerprint(base)
    return [
        *(_fingerprint_problems(config, mark) if mark is not None else []),
        *weights.compared(
            config,
            pairs,
            lambda pair: _pair_problem(pair, config),
            lambda: [] if base is None else _layout_problems(config, pairs, base),
        ),
    ]


def _marker_problems(config: Config) -> list[str]:
    if "icarus" not in config:
        return [
            "no ICaRus marker, so it is a plain LoRA; serve it as a conventional adapter, or retrain it with icarus"
        ]
    version, mark = (_marker(config).get(field) for field in ("version", "base_fingerprint"))
    if type(version) is int and version != MARKER_VERSION:
        return [
            f"marker version {short(version)} is unknown, as this icarus reads {MARKER_VERSION}; update icarus, or "
            "retrain"
        ]
    if type(version) is not int or not isinstance(mark, str) or not re.fullmatch(r"[0-9a-f]+", mark):
        return [
            f"the marker is malformed (version {short(version)}, base_fingerprint {short(mark)}); save the adapter "
            "again"
        ]
    return []


def _marker(config: Config) -> dict[str, Any]:
    marker = config.get("icarus")
    return marker if isinstance(marker, dict) else {}


def _no_targets(config: Config) -> list[str]:
    return [] if config.get("target_modules") else ["target_modules names no modules; save the adapter again"]


def setting_problems(config: Config) -> list[str]:
    """Settings that cannot be split into two streams or served as they are, or that change the base weights.

    Targets are checked elsewhere.
    """
    refusals = []
    for field, wanted in (("peft_type", "LORA"), ("task_type", "CAUSAL_LM")):
        value = config.get(field)
        if str(getattr(value, "value", value)) != wanted:
            refusals.append(f"{field} is {short(value)}, and ICaRus needs {wanted!r}; retrain with it")
    for field in ("modules_to_save", "target_parameters"):
        if config.get(field):
            refusals.append(f"{field} is set, which is not plain LoRA; retrain without it")
    refusals += settings.variant_problems(config) + settings.init_problems(config)
    for alpha in settings.alphas(config):
        if not settings.is_number(alpha) or alpha <= 0:
            refusals.append(f"lora_alpha is {short(alpha)}; set it to a finite number above 0")
    dropout = config.get("lora_dropout", 0)
    if not settings.is_number(dropout) or not 0 <= dropout < 1:
        refusals.append(f"lora_dropout is {short(dropout)}; set it to a number from 0 to below 1")
    return refusals + settings.flag_problems(config, _FLAGS)


def _target_problems(config: Config) -> list[str]:
    """Targets that feed K or V, as far as the config alone tells."""
    targets, kv = config["target_modules"], []
    if not isinstance(targets, str):
        kv = sorted(filter(feeds_kv, map(str, targets)))
    elif targets.lower() == settings.ALL_LINEAR or any(settings.targeted(config, probe) for probe in _KV_PROBES):
        kv = [targets]
    remedy = "retrain without it, or serve the adapter as a conventional one"
    return [f"target_modules has {shown(', '.join(kv))}, which feeds K or V; {remedy}"] if kv else []


def _pair_problem(pair: weights.Pair, config: Config) -> str:
    if feeds_kv(pair.module):
        return f"it has weights for {shown(pair.module)}, which feeds K or V; retrain it, or serve it as conventional"
    if not settings.targeted(config, pair.module):
        return f"it has weights for {shown(pair.module)}, which target_modules does not name; save the adapter again"
    return weights.pair_problem(pair, settings.rank_of(config, pair.module))


def _fingerprint_problems(config: Config, actual: str) -> list[str]:
    trained = str(_marker(config).get("base_fingerprint", actual))  # a marker without it is refused as such
    if trained == actual:
        return []
    name = shown(str(config.get("base_model_name_or_path") or "that one"))
    told = f"({name}, fingerprint {trained[:12]}) than this one ({actual[:12]})"
    return [f"it was trained on another base model {told}; give {name} as the base model, or retrain on this"]


def _layout_problems(config: Config, pairs: list[weights.Pair], base: nn.Module | StrPath) -> list[str]:
    refusals: list[str] = []
    for shapes in weights.descriptions(config, base):
        refusals = [problem for pair in pairs if (problem := weights.misfit(pair, shapes))]
        refusals += weights.missing(config, pairs, shapes)
        if not refusals:
            break
    return refusals
