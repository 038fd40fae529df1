"""Reading and checking an adapter directory: may this adapter share a KV cache?

An ICaRus adapter is a PEFT LoRA directory (``adapter_config.json``, ``adapter_model.safetensors``, ``README.md``)
without any projection that feeds K or V, and with ``"icarus": {"version": 1, "base_fingerprint": "<hex>"}`` in its
config. Nothing here needs PEFT and, but for ``projections.of_empty_model``, nothing needs Transformers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from icarus.adapter import projections
from icarus.adapter.files import MARKER_VERSION, WEIGHTS_NAME, StrPath, read_config, read_tensors
from icarus.adapter.fingerprints import fingerprint
from icarus.errors import AdapterError

Config = Mapping[str, Any]
Base = nn.Module | StrPath | None  # loaded, its safetensors folder, or nothing to compare with

# Parts of a projection's name that say it writes K, V or the state of a recurrent layer, which is a cache as well.
_KV_PARTS = {"k", "v", "kv", "qk", "qkv", "gqkv", "qkvz", "wk", "wv", "wkv", "wqkv", "key", "value"}
_KV_NAMES = {"c_attn", "w_pack", "att_proj", "a_proj", "b_proj", "f_a_proj", "f_b_proj", "x_proj", "dt_proj"}
_KV_PROBES = [f"model.layers.0.self_attn.{leaf}" for leaf in ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")]
_KV_PREFIX = "in_proj"  # fused projections of attention and of recurrent layers: in_proj, in_proj_qkvz, in_proj_ba

# Settings of LoraConfig that go beyond plain LoRA on projections.
_REFUSED = (
    "modules_to_save target_parameters trainable_token_indices layer_replication lora_bias use_dora use_qalora "
    "use_bdlora alora_invocation_tokens arrow_config kasa_config monteclora_config velora_config"
).split()
_PATTERNS = ("rank_pattern", "alpha_pattern")  # vLLM reads neither (its PEFTHelper)
_FLAGS = "use_rslora fan_in_fan_out inference_mode use_dora use_qalora lora_bias ensure_weight_tying".split()
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_[AB]\.weight")


@dataclass(frozen=True)
class AdapterInfo:
    """What a verified adapter directory holds."""

    directory: Path
    base_model: str | None  # name or path of the base model, as its trainer gave it
    rank: int
    alpha: float
    targets: tuple[str, ...]  # last names of the adapted modules, sorted
    base_fingerprint: str
    tensors: int
    bytes: int  # of all tensors


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
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        targets=tuple(sorted({module.rpartition(".")[2] for module in _pairs(tensors)})),
        base_fingerprint=config["icarus"]["base_fingerprint"],
        tensors=len(tensors),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
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


def _inspect(directory: Path, base: Base, mark: str | None) -> tuple[list[str], Config, dict[str, Tensor]]:
    try:
        config = read_config(directory)
    except AdapterError as error:
        return [str(error)], {}, {}
    malformed = _malformed_settings(config)
    refusals = _marker_problems(config) + (malformed or setting_problems(config) + _target_problems(config))
    try:
        tensors = read_tensors(directory)
    except AdapterError as error:
        return [*refusals, str(error)], config, {}
    refusals += _tensor_problems(tensors)
    if malformed:  # nothing to compare the tensors with
        return refusals, config, tensors
    refusals += _module_problems(tensors, config)
    if mark is None and base is not None:
        mark = fingerprint(base)
    if mark is not None:
        refusals += _fingerprint_problems(config, mark)
    if base is not None:
        refusals += _layout_problems(config, tensors, base)
    return refusals, config, tensors


# ---------------------------------------------------------------------------------------------- the config


def _marker_problems(config: Config) -> list[str]:
    if "icarus" not in config:
        return [
            "no ICaRus marker, so it is a plain LoRA; serve it as a conventional adapter, or retrain it with icarus"
        ]
    version, mark = (_marker(config).get(field) for field in ("version", "base_fingerprint"))
    if type(version) is int and version != MARKER_VERSION:
        return [f"marker version {version} is unknown, as this icarus reads {MARKER_VERSION}; update icarus or retrain"]
    if type(version) is not int or not re.fullmatch(r"[0-9a-f]+", str(mark)):
        return [f"the marker is malformed (version {version!r}, base_fingerprint {mark!r}); save the adapter again"]
    return []


def _marker(config: Config) -> dict[str, Any]:
    marker = config.get("icarus")
    return marker if isinstance(marker, dict) else {}


def _malformed_settings(config: Config) -> list[str]:
    """Fields of a form that the other checks cannot compute with."""
    rank = config.get("r")
    if type(rank) is not int or rank <= 0:
        return [f"r is {rank!r} and must be a positive integer; save the adapter again"]
    if not config.get("target_modules"):
        return ["target_modules names no modules; save the adapter again"]
    try:
        _targeted(config, "any.0.module")
    except (TypeError, re.error) as error:
        return [f"a target field holds neither names nor a valid regular expression ({error}); save the adapter again"]
    return []


def setting_problems(config: Config) -> list[str]:
    """Settings that cannot be split into two streams or served as they are, or that change the base weights.

    Targets are checked elsewhere.
    """
    refusals = []
    for field, wanted in (("peft_type", "LORA"), ("task_type", "CAUSAL_LM"), ("bias", "none")):
        value = config.get(field, "none" if field == "bias" else None)
        if str(getattr(value, "value", value)) != wanted:
            refusals.append(f"{field} is {value!r}, and ICaRus needs {wanted!r}; retrain with it")
    refusals += [
        f"{field} is set, which is not plain LoRA; retrain without it" for field in _REFUSED if config.get(field)
    ]
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(_BASE_CHANGING_INITS):
        refusals.append(
            f"init_lora_weights {init!r} changes the base weights, which write the cache; retrain with True"
        )
    remedy = "use one rank and one alpha for all modules"
    refusals += [
        f"{field} is set, and vLLM would ignore it silently; {remedy}" for field in _PATTERNS if config.get(field)
    ]
    alpha, dropout = config.get("lora_alpha"), config.get("lora_dropout", 0)
    if not _is_number(alpha) or not 0 < alpha <= sys.float_info.max:
        refusals.append(f"lora_alpha is {alpha!r}; set it to a finite number above 0")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        refusals.append(f"lora_dropout is {dropout!r}; set it to a number from 0 to below 1")
    neither = [flag for flag in _FLAGS if type(config.get(flag, False)) is not bool]
    return refusals + [f"{flag} is {config[flag]!r}; set it to true or false" for flag in neither]


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _target_problems(config: Config) -> list[str]:
    """Targets that feed K or V, as far as the config alone tells."""
    targets, kv = config["target_modules"], []
    if not isinstance(targets, str):
        kv = sorted(filter(feeds_kv, map(str, targets)))
    elif targets.lower() == "all-linear" or any(_targeted(config, probe) for probe in _KV_PROBES):
        kv = [targets]
    remedy = "retrain without it, or serve the adapter as a conventional one"
    return [f"target_modules has {', '.join(kv)}, which feeds K or V; {remedy}"] if kv else []


def _targeted(config: Config, module: str) -> bool:
    """Whether the config's targets name this module, by PEFT's rules (``peft.tuners.tuners_utils``)."""
    targets, layers = config["target_modules"], config.get("layers_to_transform")
    named = _matches(targets, module)
    if not isinstance(targets, str) and module not in targets and layers not in (None, []):
        patterns = config.get("layers_pattern") or [r"[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        matches = [re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in patterns]
        index = next((int(match.group(1)) for match in matches if match), None)
        named &= index in ([layers] if isinstance(layers, int) else layers)
    excluded = _matches(config.get("exclude_modules") or [], module)
    return named and not excluded


def _matches(names: str | Iterable[str], module: str) -> bool:
    """A regular expression for the whole path, or the ends of paths."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


# ---------------------------------------------------------------------------------------------- the tensors


def _pairs(tensors: dict[str, Tensor]) -> dict[str, list[Tensor | None]]:
    """Module to its lora_A and lora_B; None for a missing one."""
    modules = [match["module"] for match in map(_TENSOR.fullmatch, tensors) if match]
    return {m: [tensors.get(f"base_model.model.{m}.lora_{half}.weight") for half in "AB"] for m in modules}


def _tensor_problems(tensors: dict[str, Tensor]) -> list[str]:
    if not tensors:
        return [f"{WEIGHTS_NAME} holds no tensors; save the adapter again"]
    refusals = []
    for name, tensor in tensors.items():
        if not _TENSOR.fullmatch(name):
            refusals.append(f"{name} is not a LoRA weight (lora_A or lora_B of a projection); retrain without it")
        elif not tensor.is_floating_point():
            refusals.append(f"{name} holds {tensor.dtype} and not floating point numbers; save the adapter again")
        elif not torch.isfinite(tensor.float()).all():
            refusals.append(f"{name} holds NaN or infinity, so training diverged; retrain with a lower learning rate")
    return refusals


def _module_problems(tensors: dict[str, Tensor], config: Config) -> list[str]:
    refusals = []
    for module, (a, b) in _pairs(tensors).items():
        if feeds_kv(module):
            refusals.append(f"it has weights for {module}, which feeds K or V; retrain it, or serve it as conventional")
        elif not _targeted(config, module):
            refusals.append(f"it has weights for {module}, which target_modules does not name; save the adapter again")
        elif a is None or b is None:
            refusals.append(f"lora_{'A' if a is None else 'B'} of {module} is missing; copy or save the adapter again")
        elif a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            refusals.append(f"the shapes {[*a.shape]} and {[*b.shape]} of {module} do not fit together; save it again")
        elif a.shape[0] != config["r"]:
            refusals.append(f"{module} has rank {a.shape[0]} and the config says {config['r']}; save the adapter again")
    return refusals


def _fingerprint_problems(config: Config, actual: str) -> list[str]:
    trained = str(_marker(config).get("base_fingerprint", actual))  # a marker without it is refused as such
    if trained == actual:
        return []
    told = f"({config.get('base_model_name_or_path')}, fingerprint {trained[:12]}) than this one ({actual[:12]})"
    return [f"it was trained on another base model {told}; load that one, or retrain on this"]


def _layout_problems(config: Config, tensors: dict[str, Tensor], base: nn.Module | StrPath) -> list[str]:
    adapted = _pairs(tensors)
    shapes = _shapes(base, config, set(adapted))
    missing = [module for module in shapes if _targeted(config, module) and module not in adapted]
    refusals = [
        f"the weights of {module}, which target_modules names, are missing; save it again" for module in missing
    ]
    for module, (a, b) in adapted.items():
        wanted = shapes.get(module)
        if wanted is None:
            refusals.append(
                f"it has weights for {module}, which the base model lacks; use the base model it was trained on"
            )
        elif a is not None and b is not None and (shape := (*b.shape[:1], *a.shape[1:])) != wanted:
            refusals.append(
                f"{module} is {shape} here and {wanted} in the base model; use the one that it was trained on"
            )
    return refusals


def _shapes(base: nn.Module | StrPath, config: Config, adapted: set[str]) -> projections.Shapes:
    """Of a folder by its headers, where those explain the adapter."""
    if isinstance(base, nn.Module):
        return projections.of_model(base)
    shapes = projections.of_checkpoint(base, transposed=bool(config.get("fan_in_fan_out")))
    if {module for module in shapes if _targeted(config, module)} != adapted:
        return projections.of_empty_model(base) or shapes
    return shapes
