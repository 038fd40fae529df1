"""The adapter directory of one specialist: make, write, verify, read. The only file of the project that imports PEFT.

An ICaRus adapter is a PEFT LoRA directory (``adapter_config.json``, ``adapter_model.safetensors``, ``README.md``)
without any projection that feeds K or V, and with ``"icarus": {"version": 1, "base_fingerprint": "<hex>"}`` in its
config. What this file promises:

* ``attach``, ``save`` and ``load`` let nothing through that must not share a KV cache (``problems`` lists why);
* ``save`` is atomic: whatever happens, the directory holds the old adapter or the new one, whole;
* a failed ``attach`` or ``load`` leaves the model as it was;
* ``verify``, ``problems`` and ``is_icarus`` import neither PEFT nor Transformers, except to lay out the modules of a
  base folder whose checkpoint names differ from the model's.
"""

from __future__ import annotations

import copy
import ctypes
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from icarus.errors import AdapterError, IcarusError, UnsupportedModelError
from icarus.fingerprint import StrPath, checkpoint_shapes, fingerprint

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from peft import LoraConfig, PeftModel

__all__ = [
    "MARKER_VERSION",
    "AdapterInfo",
    "attach",
    "attach_conventional",
    "decoder_targets",
    "feeds_kv",
    "fingerprint",
    "from_pretrained",
    "is_icarus",
    "load",
    "names",
    "problems",
    "push_to_hub",
    "save",
    "save_conventional",
    "verify",
]

MARKER_VERSION = 1
"""Version of the ``icarus`` object in ``adapter_config.json`` that this file writes and reads."""

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
_PICKLE = "adapter_model.bin"

Config = dict[str, Any]
Shapes = dict[str, tuple[int, int]]
"""Module name to (out features, in features)."""

# Parts of a projection's name that say it writes K, V or the state of a recurrent layer, which is a cache as well.
_KV_PARTS = {"k", "v", "kv", "qk", "qkv", "gqkv", "qkvz", "wk", "wv", "wkv", "wqkv", "key", "value"}
_KV_NAMES = {"c_attn", "w_pack", "att_proj", "a_proj", "b_proj", "f_a_proj", "f_b_proj", "x_proj", "dt_proj"}
_KV_PREFIX = "in_proj"  # fused projections of attention and of recurrent layers: in_proj, in_proj_qkvz, in_proj_ba
_ROUTERS = {"gate", "router", "router_gate", "modality_router", "wg", "shared_expert_gate"}

_REFUSED = {
    "modules_to_save": "whole modules cannot be switched between two streams",
    "use_dora": "DoRA rescales the base weights",
    "alora_invocation_tokens": "aLoRA and ICaRus are different ways to share a cache",
    "target_parameters": "expert tensors are not separate projections",
    "trainable_token_indices": "both streams start from the same embeddings",
    "layer_replication": "the base model would have other layers",
    "lora_bias": "bias in LoRA is served by no engine",
    "use_qalora": "QALoRA is served by no engine",
    "use_bdlora": "BD-LoRA is not plain LoRA",
    "arrow_config": "Arrow mixes several adapters",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA samples its weights",
    "loftq_config": "LoftQ changes the base weights",
    "corda_config": "CorDA changes the base weights",
    "lora_ga_config": "LoRA-GA changes the base weights",
}
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")


@dataclass(frozen=True)
class AdapterInfo:
    """What a verified adapter directory holds."""

    directory: Path
    base_model: str | None
    """Name or path of the base model, as its trainer gave it."""
    rank: int
    """The largest rank of any module (what ``--max-lora-rank`` must allow)."""
    alpha: float
    targets: tuple[str, ...]
    """Last names of the adapted modules, sorted."""
    base_fingerprint: str
    tensors: int
    bytes: int
    """Bytes of all tensors."""


# ---------------------------------------------------------------------------------------------- targets


def feeds_kv(module_name: str) -> bool:
    """Whether a module of this (dotted) name writes K, V or recurrent state, alone or fused with others."""
    leaf = module_name.rpartition(".")[2].lower()
    parts = re.split(r"[^a-z0-9]+", leaf)
    return leaf in _KV_NAMES or leaf.startswith(_KV_PREFIX) or not _KV_PARTS.isdisjoint(parts)


def decoder_targets(model: nn.Module) -> list[str]:
    """Default LoRA targets, sorted: the names of all linear projections in the layers except those that feed K or V.

    That is PEFT's 'all-linear' (so no lm_head and no embeddings) without K, V and routers. Where PEFT would turn a
    name into expert tensors (for example ``up_proj`` in Qwen3-MoE) it is left out, as those are no projections.
    Raises UnsupportedModelError where nothing is left.
    """
    leaves = {name.rpartition(".")[2] for name in _linears(model) if re.search(r"\.\d+\.", name)}
    targets = {leaf for leaf in leaves if not feeds_kv(leaf)} - _ROUTERS
    targets -= _expert_names(model, targets)
    if not targets:
        raise UnsupportedModelError(
            f"{type(_base(model)).__name__} has no linear projection besides those that feed K and V: ICaRus needs "
            "separate ones, so choose another base model."
        )
    return sorted(targets)


def _base(model: nn.Module) -> nn.Module:
    get_base = getattr(model, "get_base_model", None)
    return get_base() if callable(get_base) else model


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """Linear modules (also GPT-2's Conv1D) by the names that they have without adapters."""
    found = {}
    for name, module in _base(model).named_modules():
        inner = getattr(module, "base_layer", module)
        linear = isinstance(inner, nn.Linear) or type(inner).__name__ == "Conv1D"
        if linear and ".lora_" not in name and not name.endswith(".base_layer"):
            found[name] = inner
    return found


def _expert_names(model: nn.Module, targets: Iterable[str]) -> set[str]:
    """Names that PEFT would rewrite to ``target_parameters``: the experts that Transformers 5 merges on loading."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    found = set()
    for target in targets:
        config = LoraConfig(target_modules=[target])
        try:
            convert_peft_config_for_transformers(config, model=_base(model), conversions=None)
        except ValueError:  # one half of a fused pair
            found.add(target)
        if config.target_parameters:
            found.add(target)
    return found


# ---------------------------------------------------------------------------------------------- in memory


def attach(
    model: nn.Module,
    config: LoraConfig | None = None,
    *,
    name: str = "default",
    rank: int = 16,
    alpha: int | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | str | None = None,
) -> PeftModel:
    """A fresh, trainable, active ICaRus adapter on a causal LM, plain or with other adapters; the base is frozen.

    Without ``config`` the adapter is plain LoRA of ``rank``, ``alpha`` (default: twice the rank), ``dropout`` and
    ``targets`` (default: ``decoder_targets``); with it those arguments are not read. A config without targets gets the
    default ones, and the caller's object is not changed.

    Raises AdapterError for a setting that ICaRus cannot serve, and UnsupportedModelError where the targets resolve to
    a projection that feeds K or V; the model is then as it was.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    _check_name(model, name)
    if name in names(model):
        raise AdapterError(f"The model already has an adapter {name!r}: choose another name or delete that one.")
    if config is None:
        config = LoraConfig(r=rank, lora_alpha=2 * rank if alpha is None else alpha, lora_dropout=dropout)
        config.target_modules = targets if isinstance(targets, str) or targets is None else list(targets)
    config = copy.deepcopy(config)
    config.task_type = config.task_type or "CAUSAL_LM"
    config.target_modules = config.target_modules or decoder_targets(model)
    if found := _feature_problems(vars(config)):
        raise AdapterError(f"Adapter {name!r} cannot be attached: {found[0]}.")
    with _unchanged_on_failure(model), _quiet():
        try:
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
                model.set_adapter(name)
                adapted = model
            else:
                adapted = get_peft_model(model, config, adapter_name=name)
        except (ValueError, TypeError) as error:
            raise AdapterError(f"PEFT cannot attach adapter {name!r}: {error}") from error
        _check_resolved(adapted, name)
    return adapted


def attach_conventional(
    model: nn.Module,
    *,
    name: str = "default",
    rank: int = 16,
    alpha: int | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
) -> PeftModel:
    """The baseline: ordinary LoRA on all linear projections, K and V too, so that each model needs its own cache."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank if alpha is None else alpha, lora_dropout=dropout)
    config.task_type, config.target_modules = "CAUSAL_LM", list(targets) if targets else "all-linear"
    return get_peft_model(model, config, adapter_name=name)


def names(model: nn.Module) -> list[str]:
    """Names of the attached adapters, in order of attachment."""
    return list(getattr(model, "peft_config", {}))


def _adapted(model: nn.Module, name: str) -> list[str]:
    """Paths of the modules that carry adapter ``name``."""
    kinds = ("lora_A", "lora_embedding_A")
    modules = [(path, module) for path, module in _base(model).named_modules() if ".lora_" not in path]
    return [path for path, module in modules if any(name in getattr(module, kind, ()) for kind in kinds)]


def _check_resolved(model: PeftModel, name: str) -> None:
    """What the targets became on this model, whatever the way in which they were written."""
    if kv := [module for module in _adapted(model, name) if feeds_kv(module)]:
        leaves = ", ".join(sorted({module.rpartition(".")[2] for module in kv}))
        raise UnsupportedModelError(
            f"The targets of adapter {name!r} resolve to {leaves} ({kv[0]}), which feed K and V: leave them out, for "
            f"example with target_modules={decoder_targets(model)}."
        )
    if found := _feature_problems(vars(model.peft_config[name])):
        raise AdapterError(f"Adapter {name!r} cannot be attached: {found[0]}.")
    if odd := sorted(set(_adapted(model, name)) - _linears(model).keys()):
        raise AdapterError(f"Adapter {name!r} targets {odd[0]}, which is no linear projection: leave it out.")


def _check_name(model: nn.Module, name: str) -> None:
    """PEFT builds module paths and file names from adapter names and finds them again by substring."""
    reserved = {"lora_A", "lora_B", "base_layer", "base_model", "weight", "bias"}
    parts = {part for path, _ in _base(model).named_modules() if ".lora_" not in path for part in path.split(".")}
    if not name or re.search(r"[./\\\0]", name) or hasattr(nn.ModuleDict(), name) or name in reserved | parts:
        raise AdapterError(
            f"{name!r} cannot name an adapter in PEFT: choose a name without dots and slashes that no module has."
        )


@contextmanager
def _unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """On an exception puts back modules, parameters, flags and settings (PEFT works in place and has no way back)."""
    owners: list[Any] = [*model.modules(), *(c for c in [getattr(model, "config", None)] if hasattr(c, "__dict__"))]
    values = [(owner, dict(vars(owner))) for owner in owners]
    held = {id(v): (v, copy.copy(v)) for _, v_by_k in values for v in v_by_k.values() if isinstance(v, _CONTAINERS)}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for owner, before in values:
            vars(owner).clear()
            vars(owner).update(before)
        for container, content in held.values():
            _refill(container, content)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


_CONTAINERS = (dict, list, set)


def _refill(container: Any, content: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(content)


@contextmanager
def _quiet() -> Iterator[None]:
    """What PEFT warns of needlessly here: our marker as an unknown field, another adapter becoming active while one is
    replaced, and names like 'a', after which it may not find tensors (``_check_loaded`` makes sure of that)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Adapter name .* should not be contained in the prefix")
        warnings.filterwarnings("ignore", message=r"Unexpected keyword arguments \['icarus'\]")
        warnings.filterwarnings("ignore", message=r"Adapter .* was active which is now deleted")
        yield


# ---------------------------------------------------------------------------------------------- verify


def is_icarus(directory: StrPath) -> bool:
    """Whether the directory's config carries the ICaRus marker; says nothing about its soundness."""
    try:
        config = json.loads((Path(directory) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "icarus" in config


def verify(directory: StrPath, base: nn.Module | StrPath | None = None) -> AdapterInfo:
    """Checks that an adapter is sound and may share a KV cache; see ``problems`` for what is checked and ``base``.

    Raises AdapterError with the first refusal, its reason and remedy, and the number of further ones.
    """
    found, config, tensors = _inspect(Path(directory), base)
    if found:
        more = f" ({len(found) - 1} more problems: see `icarus verify`)" if len(found) > 1 else ""
        raise AdapterError(f"{directory}: {found[0]}.{more}")
    return AdapterInfo(
        directory=Path(directory),
        base_model=config.get("base_model_name_or_path"),
        rank=max(tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name),
        alpha=float(config["lora_alpha"]),
        targets=tuple(sorted({module.rpartition(".")[2] for module in _modules(tensors)})),
        base_fingerprint=config["icarus"]["base_fingerprint"],
        tensors=len(tensors),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
    )


def problems(directory: StrPath, base: nn.Module | StrPath | None = None) -> list[str]:
    """All reasons to refuse an adapter directory, in order of weight; empty for a sound one.

    Checked: files, config, marker, settings, targets (by config and by tensor names), tensors (halves, shapes, rank,
    finite values). With ``base``, a loaded model or its safetensors folder, also its fingerprint and that the tensors
    are exactly those of the modules that the targets name there. Raises InputError where ``base`` cannot be read.
    """
    return _inspect(Path(directory), base)[0]


def _inspect(directory: Path, base: nn.Module | StrPath | None) -> tuple[list[str], Config, dict[str, Tensor]]:
    try:
        config = _read_config(directory)
    except AdapterError as error:
        return [str(error)], {}, {}
    found = _marker_problems(config) + _feature_problems(config) + _target_problems(config)
    try:
        tensors = _read_tensors(directory)
    except AdapterError as error:
        return [*found, str(error)], config, {}
    sane = not _type_problems(config)
    found += _tensor_problems(tensors, config if sane else None)
    if base is not None and sane:
        found += _base_problems(config, tensors, base)
    return found, config, tensors


def _read_config(directory: Path) -> Config:
    if not directory.is_dir():
        raise AdapterError("there is no such directory: give the folder of an adapter, with adapter_config.json")
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{CONFIG} is missing: give the folder of an adapter, or copy it again") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{CONFIG} is not readable JSON ({error}): copy or save the adapter again") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{CONFIG} is not a JSON object: copy or save the adapter again")
    return config


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    if not (directory / WEIGHTS).is_file():
        if (directory / _PICKLE).is_file():
            raise AdapterError(f"only {_PICKLE} is there, a pickle that could run code: save it as {WEIGHTS}")
        raise AdapterError(f"{WEIGHTS} is missing: copy or save the adapter again")
    try:
        tensors: dict[str, Tensor] = load_file(directory / WEIGHTS)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{WEIGHTS} is truncated or no safetensors file ({error}): copy or save it again") from None
    return tensors


def _marker_problems(config: Config) -> list[str]:
    if "icarus" not in config:
        return ["no ICaRus marker, so it is a plain LoRA: serve it as a conventional adapter, or retrain with icarus"]
    marker = config["icarus"]
    version = marker.get("version") if isinstance(marker, dict) else None
    if type(version) is not int:
        return [f"the marker {marker!r} is malformed (no version number): save the adapter again with icarus"]
    if version != MARKER_VERSION:
        return [f"marker version {version} is unknown, this icarus reads {MARKER_VERSION}: update icarus or retrain"]
    if not re.fullmatch(r"[0-9a-f]+", str(marker.get("base_fingerprint"))):
        return ["the marker is malformed (base_fingerprint is no hex string): save the adapter again with icarus"]
    return []


def _type_problems(config: Config) -> list[str]:
    """Fields that the other checks compute with."""
    ranks = config.get("rank_pattern") or {}
    if not _is_rank(config.get("r")):
        return [f"r is {config.get('r')!r} and not a positive whole number: save the adapter again"]
    if not isinstance(ranks, dict) or not all(_is_rank(rank) for rank in ranks.values()):
        return ["rank_pattern does not map module names to positive whole numbers: save the adapter again"]
    if type(config.get("lora_alpha")) not in (int, float):
        return [f"lora_alpha is {config.get('lora_alpha')!r} and not a number: save the adapter again"]
    targets = config.get("target_modules")
    if not targets or not (isinstance(targets, str) or all(isinstance(target, str) for target in targets)):
        return ["target_modules names no modules: save the adapter again"]
    patterns = [targets if isinstance(targets, str) else "", *ranks]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error:
            return [f"{pattern!r} is no regular expression: correct target_modules or rank_pattern"]
    return []


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0


def _feature_problems(config: Config) -> list[str]:
    """Settings that cannot be split into two streams, or that change the base weights."""
    found = []
    for field, wanted in (("peft_type", "LORA"), ("task_type", "CAUSAL_LM"), ("bias", "none")):
        value = config.get(field, "none" if field == "bias" else None)
        if str(getattr(value, "value", value)) != wanted:
            found.append(f"{field} is {value!r}, and ICaRus needs {wanted!r}: retrain with it")
    found += [f"{field} is set, but {why}: retrain without it" for field, why in _REFUSED.items() if config.get(field)]
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(_BASE_CHANGING_INITS):
        found.append(f"init_lora_weights {init!r} changes the base weights, which write the cache: retrain with True")
    for field in ("rank_pattern", "alpha_pattern"):
        kv = [key for key in config.get(field) or {} if feeds_kv(re.split(r"[.\\^]", key.rstrip("$"))[-1])]
        found += [f"{field} names {kv[0]!r}, which feeds K or V: take it out"] if kv else []
    return found


def _target_problems(config: Config) -> list[str]:
    """Targets that feed K or V, as far as the config alone tells."""
    if found := _type_problems(config):
        return found
    targets = config["target_modules"]
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            kv = ["all-linear"]
        else:
            probes = (f"model.layers.0.self_attn.{leaf}" for leaf in ("k_proj", "v_proj", "qkv_proj", "kv_b_proj"))
            kv = [targets] if any(_targeted(config, probe) for probe in probes) else []
    else:
        kv = sorted(target for target in targets if feeds_kv(target))
    remedy = "retrain without it, or serve the adapter as a conventional one"
    return [f"target_modules has {', '.join(kv)}, which feeds K or V: {remedy}"] if kv else []


def _targeted(config: Config, module: str) -> bool:
    """Whether the config's targets name this module, by PEFT's rules (``peft.tuners.tuners_utils``)."""
    targets, exclude = config["target_modules"], config.get("exclude_modules") or []
    if re.fullmatch(exclude, module) if isinstance(exclude, str) else _listed(exclude, module):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    if module in targets:
        return True
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return _listed(targets, module)
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    matches = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in patterns)
    index = next((int(match.group(1)) for match in matches if match), None)
    return _listed(targets, module) and index in ([layers] if isinstance(layers, int) else layers)


def _listed(entries: Iterable[str], module: str) -> bool:
    return any(module == entry or module.endswith(f".{entry}") for entry in entries)


def _rank(config: Config, module: str) -> int:
    """Rank of one module: the first pattern that fits its name's end, else ``r`` (PEFT's ``get_pattern_key``)."""
    patterns: dict[str, int] = config.get("rank_pattern") or {}
    fits = (rank for pattern, rank in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(fits, int(config["r"]))


def _modules(tensors: Iterable[str]) -> list[str]:
    matches = (_TENSOR.fullmatch(name) for name in tensors)
    return list(dict.fromkeys(match["module"] for match in matches if match))


def _tensor_problems(tensors: dict[str, Tensor], config: Config | None) -> list[str]:
    """``config`` is None where it is too damaged to compare with."""
    if not tensors:
        return [f"{WEIGHTS} holds no tensors: save the adapter again"]
    found = [f"{name} is no LoRA weight (lora_A or lora_B of a projection): retrain without it"
             for name in sorted(tensors) if not _TENSOR.fullmatch(name)]  # fmt: skip
    for module in _modules(tensors):
        found += _module_problems(module, tensors, config)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            found.append(f"{name} holds {tensor.dtype} and not floating point numbers: save the adapter again")
        elif not torch.isfinite(tensor.float()).all():
            found.append(f"{name} holds NaN or infinity: training diverged, so retrain with a lower learning rate")
    return found


def _module_problems(module: str, tensors: dict[str, Tensor], config: Config | None) -> list[str]:
    if feeds_kv(module):
        return [f"it has weights for {module}, which feeds K or V: retrain without it, or serve it as conventional"]
    if config and not _targeted(config, module):
        return [f"it has weights for {module}, which target_modules does not name: save the adapter again"]
    halves = {half: tensors.get(f"base_model.model.{module}.lora_{half}.weight") for half in "AB"}
    a, b = halves["A"], halves["B"]
    if a is None or b is None:
        return [f"lora_{'A' if a is None else 'B'} of {module} is missing: copy or save the adapter again"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        return [f"the shapes {tuple(a.shape)} and {tuple(b.shape)} of {module} do not fit together: save it again"]
    if config and a.shape[0] != _rank(config, module):
        return [f"{module} has rank {a.shape[0]} and the config says {_rank(config, module)}: save the adapter again"]
    return []


# ---------------------------------------------------------------------------------------------- against a base model


def _base_problems(config: Config, tensors: dict[str, Tensor], base: nn.Module | StrPath) -> list[str]:
    found = []
    marker = config.get("icarus")
    trained = marker.get("base_fingerprint") if isinstance(marker, dict) else None
    actual = fingerprint(base)
    if trained is not None and trained != actual:
        found.append(
            f"it was trained on another base model ({config.get('base_model_name_or_path')}, fingerprint "
            f"{str(trained)[:12]}) than this one ({actual[:12]}): load that one, or retrain on this"
        )
    adapted = _modules(tensors)
    shapes = _shapes(base) if isinstance(base, nn.Module) else _folder_shapes(Path(base), adapted, config)
    missing = [module for module in shapes if _targeted(config, module) and module not in adapted]
    found += [f"the weights of {module}, which target_modules names, are missing: save it again" for module in missing]
    for module in adapted:
        if module not in shapes:
            found.append(
                f"it has weights for {module}, which the base model lacks: use the base model that it was trained on"
            )
        elif (shape := _delta_shape(module, tensors)) not in (None, shapes[module]):
            found.append(
                f"{module} is {shape} here and {shapes[module]} in the base model: use the one it was trained on"
            )
    return found


def _delta_shape(module: str, tensors: dict[str, Tensor]) -> tuple[int, int] | None:
    """(out, in) of the weight that B A adds to; None where a half is missing or damaged."""
    a, b = (tensors.get(f"base_model.model.{module}.lora_{half}.weight") for half in "AB")
    return (b.shape[0], a.shape[1]) if a is not None and b is not None and a.dim() == b.dim() == 2 else None


def _shapes(model: nn.Module) -> Shapes:
    return {name: _linear_shape(module) for name, module in _linears(model).items()}


def _linear_shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    inputs, outputs = module.get_parameter("weight").shape  # Conv1D stores its transpose
    return outputs, inputs


def _folder_shapes(folder: Path, adapted: Sequence[str], config: Config) -> Shapes:
    """From the checkpoint's headers if they explain the adapter, else from an empty model.

    A checkpoint may have other names than the model, and experts as separate matrices that the model holds as one.
    """
    suffix = ".weight"
    stored = {n.removesuffix(suffix): s for n, s in checkpoint_shapes(folder).items() if n.endswith(suffix)}
    flip = -1 if config.get("fan_in_fan_out") else 1
    shapes: Shapes = {name: (s[::flip][0], s[::flip][1]) for name, s in stored.items() if len(s) == 2}
    if {module for module in shapes if _targeted(config, module)} == set(adapted):
        return shapes
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            auto: Any = AutoModelForCausalLM  # untyped
            layout = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            return _shapes(auto.from_config(layout, trust_remote_code=False))
    except (OSError, ValueError, KeyError):  # no config, or a model that Transformers does not know
        return shapes


# ---------------------------------------------------------------------------------------------- save


def save(
    model: PeftModel,
    directory: StrPath,
    *,
    name: str = "default",
    base_fingerprint: str | None = None,
    card: Mapping[str, object] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes adapter ``name`` as an ICaRus adapter directory, atomically, and returns the directory.

    ``base_fingerprint`` defaults to the model's own; ``card`` adds fields to the model card's front matter (``tags``
    are joined); ``dtype`` is that of the stored tensors, by default the one in memory. Other files in the directory
    are kept; config, weights, model card and an ``adapter_model.bin`` are replaced.

    Raises AdapterError, with the directory untouched, for an adapter that ``problems`` refuses (NaN, a target that
    feeds K or V, ...).
    """
    target = Path(directory).expanduser().resolve()
    if name not in names(model):
        raise AdapterError(f"The model has no adapter {name!r} to save: it has {', '.join(names(model)) or 'none'}.")
    if target.exists() and not target.is_dir():
        raise AdapterError(f"{target} is a file and an adapter is a directory: choose another path.")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.{uuid4().hex[:8]}.tmp"
    work.mkdir()  # not mkdtemp, whose folders only their owner can read
    try:
        new = _write(model, work, name, base_fingerprint or fingerprint(model), card or {}, dtype)
        if found := problems(new):
            raise AdapterError(f"Adapter {name!r} is not saved to {target}: {found[0]}.")
        _install(new, target, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def save_conventional(model: PeftModel, directory: StrPath, *, dtype: torch.dtype | None = None) -> Path:
    """Writes a conventional adapter as a plain PEFT directory, atomically as ``save`` does; returns the directory."""
    target = Path(directory).expanduser().resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.{uuid4().hex[:8]}.tmp"
    work.mkdir()
    try:
        state = {k: v.to(dtype) if dtype and ".lora_" in k else v for k, v in model.state_dict().items()}
        model.save_pretrained(str(work), state_dict=state, save_embedding_layers=False)
        _install(work, target, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _write(
    model: PeftModel, work: Path, name: str, mark: str, card: Mapping[str, object], dtype: torch.dtype | None
) -> Path:
    options: dict[str, Any] = {"selected_adapters": [name], "save_embedding_layers": False}
    if dtype is not None:
        options["state_dict"] = {k: v.to(dtype) if ".lora_" in k else v for k, v in model.state_dict().items()}
    model.save_pretrained(str(work), **options)
    new = work if name == "default" else work / name
    config = json.loads((new / CONFIG).read_text(encoding="utf-8"))
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # a set in memory; equal adapters shall give equal files
    config["icarus"] = {"version": MARKER_VERSION, "base_fingerprint": mark}
    (new / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (new / CARD).write_text(_card(config, card), encoding="utf-8")
    (new / WEIGHTS).chmod((new / CONFIG).stat().st_mode)  # safetensors writes files that only their owner can read
    return new


def _install(new: Path, target: Path, work: Path) -> None:
    """Puts the finished directory in place; at no moment is a part of one adapter mixed with a part of another."""
    ours = (CONFIG, WEIGHTS, CARD)
    for file in ours:
        _sync(new / file)
    _sync(new)
    if (target / CONFIG).exists():
        _keep_others(target, new)
        _swap(new, target, work)
    elif target.exists() and any(target.iterdir()):  # the user's folder, of which only our files are our business
        for file in (WEIGHTS, CARD, CONFIG):  # an adapter only once it has its config
            os.replace(new / file, target / file)
        _sync(target)
    else:
        os.replace(new, target)
    _sync(target.parent)


def _keep_others(target: Path, new: Path) -> None:
    """Links (or copies) into the new directory what the old one holds besides the adapter."""
    replaced = {CONFIG, WEIGHTS, CARD, _PICKLE}

    def link(source: str, copied: str) -> None:
        try:
            os.link(source, copied)
        except OSError:  # a file system without hard links
            shutil.copy2(source, copied)

    def ignore(folder: str, files: list[str]) -> set[str]:
        return replaced & set(files) if Path(folder) == target else set()

    shutil.copytree(target, new, ignore=ignore, copy_function=link, symlinks=True, dirs_exist_ok=True)


def _swap(new: Path, target: Path, work: Path) -> None:
    """Replaces a directory by another: in one step where the system can, else in two with a way back."""
    if _exchange(new, target):
        return
    old = work.with_suffix(".old")
    os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Linux's renameat2 with RENAME_EXCHANGE; False where system or file system lacks it (nothing is changed then)."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _card(config: Config, extra: Mapping[str, object]) -> str:
    from huggingface_hub import ModelCardData

    base = config.get("base_model_name_or_path")
    fields: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation"}
    if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base):  # the Hub takes no local paths here
        fields["base_model"] = base
    given = extra.get("tags", [])
    tags = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else []
    fields |= {**extra, "tags": list(dict.fromkeys(["icarus", "lora", "shared-kv-cache", *map(str, tags)]))}
    return _CARD.format(
        front=ModelCardData(**fields).to_yaml(),
        base=base or "(unnamed)",
        mark=config["icarus"]["base_fingerprint"],
        rank=config["r"],
        targets=config["target_modules"],
    )


_CARD = """---
{front}
---

# ICaRus adapter

A task specialist for the base model `{base}`: LoRA (rank {rank}) on {targets}, trained as the *logical decoder* of
ICaRus (arXiv 2603.13281). The base model writes the KV cache and this adapter only reads it, so any number of such
specialists share one cache.

**Do not load it as a plain LoRA.** PEFT, vLLM and other loaders without ICaRus accept these files, run, and give
answers that are subtly wrong, with no error: in plain LoRA the adapter's hidden states flow into K and V of later
layers, which this adapter was never trained for.

## How to load it

```python
from icarus import adapter
from transformers import AutoModelForCausalLM

model = adapter.load(AutoModelForCausalLM.from_pretrained("{base}"), "PATH_OR_HUB_ID", "NAME")
```

```
icarus verify PATH
icarus serve {base} --adapters NAME=PATH
```

It fits the base weights with fingerprint `{mark}` and no others; `icarus` checks that.
"""


# ---------------------------------------------------------------------------------------------- load and the Hub


def load(
    model: nn.Module,
    source: StrPath,
    name: str,
    *,
    verify: bool = True,
    is_trainable: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> PeftModel:
    """Attaches an adapter directory, or a Hub repository (a local path wins), as ``name``; returns the PEFT model.

    An adapter of that name is replaced, and stays active if it was. Like PEFT, the first adapter of a model becomes
    active and a further one does not. ``verify=False`` skips all checks of the adapter, and so takes conventional
    ones. Raises AdapterError with the model as it was.
    """
    from peft import PeftModel

    _check_name(model, name)
    directory = _local(source, revision, token)
    if verify:
        _verify(directory, model)
    with _unchanged_on_failure(model), _quiet():
        try:
            if isinstance(model, PeftModel):
                _add_or_replace(model, directory, name, is_trainable)
                adapted = model
            else:
                adapted = PeftModel.from_pretrained(
                    model, str(directory), adapter_name=name, is_trainable=is_trainable, torch_device="cpu"
                )
            _check_loaded(adapted, directory, name)
        except IcarusError:
            raise
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise AdapterError(
                f"{directory} could not be loaded as {name!r} ({error}): run `icarus verify`."
            ) from error
    return adapted


_verify = verify  # `load` has a switch of that name


def from_pretrained(
    model: nn.Module,
    source: StrPath,
    name: str = "default",
    *,
    is_trainable: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> PeftModel:
    """``load`` under PEFT's name and with its default adapter name."""
    return load(model, source, name, is_trainable=is_trainable, revision=revision, token=token)


def push_to_hub(
    model: PeftModel,
    repo_id: str,
    *,
    name: str = "default",
    base_fingerprint: str | None = None,
    card: Mapping[str, object] | None = None,
    dtype: torch.dtype | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload ICaRus adapter",
    create_pr: bool = False,
) -> CommitInfo:
    """Saves the adapter (see ``save``) and uploads it to a Hub repository, which is created where it is missing."""
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        written = save(
            model, Path(folder, "adapter"), name=name, base_fingerprint=base_fingerprint, card=card, dtype=dtype
        )
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=written,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )


def _add_or_replace(model: PeftModel, directory: Path, name: str, is_trainable: bool) -> None:
    active = list(model.active_adapters)
    if name in names(model):
        model.delete_adapter(name)
    model.load_adapter(str(directory), name, is_trainable=is_trainable, torch_device="cpu")
    if name in active:
        tuner: Any = model.base_model  # takes several names, unlike the PeftModel
        tuner.set_adapter(active, inference_mode=not is_trainable)


def _check_loaded(model: PeftModel, directory: Path, name: str) -> None:
    """PEFT only warns of tensors that it did not find a place for."""
    from peft import get_peft_model_state_dict

    loaded = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    for key, tensor in _read_tensors(directory).items():
        if key not in loaded or not torch.equal(loaded[key].detach().cpu().float(), tensor.float()):
            raise AdapterError(f"{directory}: PEFT did not load {key}: use a base model of the right kind.")


def _local(source: StrPath, revision: str | None, token: str | bool | None) -> Path:
    path = Path(source).expanduser()
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        return path
    from huggingface_hub import snapshot_download

    files = [CONFIG, WEIGHTS, _PICKLE, CARD]
    try:
        return Path(snapshot_download(str(source), revision=revision, token=token, allow_patterns=files))
    except (OSError, ValueError) as error:
        why = str(error).strip().partition("\n")[0].rstrip(".")
        raise AdapterError(
            f"{source} is no local folder and could not be fetched from the Hub ({why}): check name and connection."
        ) from error
