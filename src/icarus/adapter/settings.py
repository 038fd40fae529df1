"""What the config of a LoRA adapter says, of either kind: its settings, its targets, and the rank of each module.

A setting is refused where PEFT, two streams or vLLM would do something else than the file asks for.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any, TypeGuard

import regex  # whose matches have a time limit; vLLM matches with it, too

from icarus.adapter.files import Config

ALL_LINEAR = "all-linear"
"""PEFT's shorthand for every linear projection but the head."""

PATTERNS = ("rank_pattern", "alpha_pattern")
"""Fields that give some modules another rank or alpha; vLLM reads them from 0.32.0 on."""

VARIANTS = (
    "trainable_token_indices layer_replication lora_bias use_dora use_qalora use_bdlora alora_invocation_tokens "
    "arrow_config kasa_config monteclora_config velora_config"
).split()
"""Settings of LoraConfig that make something else of an adapter than plain LoRA."""

# vLLM knows which initialisations leave the base weights alone (_init_is_supported in vllm/lora/peft_helper.py).
_HARMLESS_INITS = {"gaussian", "eva", "orthogonal", "mica"}

SLOW = "a regular expression of the config takes too long to match; name the modules instead"
"""What to say of a TimeoutError of the functions here."""

_MATCH_S = 1.0  # for a name of a module, which takes microseconds


def malformed(config: Config) -> list[str]:
    """Fields of a form that the other checks cannot compute with; at most one is named."""
    rank = config.get("r")
    if not _is_rank(rank):
        return [f"r is {short(rank)} and must be a positive integer; save the adapter again"]
    try:
        targeted({**config, "target_modules": config.get("target_modules") or []}, "any.0.module")
    except (TypeError, regex.error) as error:
        return [f"a target field holds neither names nor a valid regular expression ({error}); save the adapter again"]
    return _malformed_patterns(config)


def _malformed_patterns(config: Config) -> list[str]:
    for field in PATTERNS:
        pattern = config.get(field) or {}
        if not isinstance(pattern, dict):
            return [f"{field} is {short(pattern)} and not an object of module names; save the adapter again"]
        for key, value in pattern.items():
            if not (_is_rank(value) if field == "rank_pattern" else is_number(value)):
                return [
                    f"{field} has {short(value)} for {shown(key)}, which is not a valid {field[:-8]}; "
                    "save the adapter again"
                ]
            try:
                _named_by(key, "module")
            except regex.error as error:
                return [
                    f"{field} has {shown(key)}, which is not a valid regular expression ({error}); "
                    "save the adapter again"
                ]
    return []


def _is_rank(value: object) -> TypeGuard[int]:
    return type(value) is int and value > 0


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a number, and one that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return -sys.float_info.max <= value <= sys.float_info.max


def short(value: object) -> str:
    """A value as part of a sentence, whatever somebody wrote there."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "an integer that is far too long"
    return text if len(text) <= 80 else f"{text[:80]} ..."


def shown(name: str) -> str:
    """A name as part of a sentence, whatever somebody wrote into a file."""
    return name if name.isprintable() and len(name) <= 200 else short(name)


def variant_problems(config: Config) -> list[str]:
    """Settings of both kinds of adapter that ask for more than plain LoRA."""
    refusals = [
        f"{field} is set, which is not plain LoRA; retrain without it" for field in VARIANTS if config.get(field)
    ]
    if (bias := config.get("bias", "none")) != "none":
        refusals.append(f"bias is {short(bias)}, and a LoRA without biases needs 'none'; retrain with it")
    return refusals


def init_problems(config: Config, harmless: Iterable[str] = ()) -> list[str]:
    """An initialisation that changes base weights, or one that nobody knows; ``harmless`` adds to what does not."""
    init = config.get("init_lora_weights")
    if not isinstance(init, str) or init.lower() in {*_HARMLESS_INITS, *harmless}:
        return []
    return [f"init_lora_weights {short(init)} changes the base weights, which write the cache; retrain with true"]


def flag_problems(config: Config, flags: Iterable[str]) -> list[str]:
    """Flags that are neither true nor false: a word like "false" would count as true."""
    odd = [flag for flag in flags if type(config.get(flag, False)) is not bool]
    return [f"{flag} is {short(config[flag])}; set it to true or false" for flag in odd]


# ---------------------------------------------------------------------------------------------- targets


def targeted(config: Config, module: str) -> bool:
    """Whether the config's targets name this module, by PEFT's rules (``peft.tuners.tuners_utils``).

    Raises:
        TimeoutError: a regular expression backtracks without an end.
    """
    targets, layers = config["target_modules"], config.get("layers_to_transform")
    named = matches(targets, module)
    if not isinstance(targets, str) and module not in targets and layers not in (None, []):
        patterns = config.get("layers_pattern") or [r"[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        indices = [
            regex.match(rf"(?:^|.*?\.){pattern}\.(\d{{1,9}})\.", module, timeout=_MATCH_S) for pattern in patterns
        ]
        index = next((int(match[1]) for match in indices if match), None)
        named &= index in ([layers] if isinstance(layers, int) else layers)
    excluded = matches(config.get("exclude_modules") or [], module)
    return named and not excluded


def matches(names: str | Iterable[str], module: str) -> bool:
    """A regular expression for the whole path, or the ends of paths."""
    if isinstance(names, str):
        return regex.fullmatch(names, module, timeout=_MATCH_S) is not None
    if others := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"{short(others[0])} is no name")
    return any(module == name or module.endswith(f".{name}") for name in names)


# ---------------------------------------------------------------------------------------------- ranks


def rank_of(config: Config, module: str) -> int:
    """The rank of one module, by PEFT's rules: the first pattern that names the end of its path, else ``r``."""
    rank: int = _by_pattern(config.get("rank_pattern"), module, config["r"])
    return rank


def scale_of(config: Config, module: str) -> float:
    """What one module's product of A and B is multiplied by: alpha over the rank, or over its root (rsLoRA)."""
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    rank = rank_of(config, module)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) if is_number(alpha) else 1.0


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    return next((value for key, value in (patterns or {}).items() if _named_by(key, module)), default)


def highest_rank(config: Config) -> int:
    """The rank that a server must have room for, as vLLM counts (``validate_legal`` in vllm/lora/peft_helper.py)."""
    ranks: list[int] = [config["r"], *(config.get("rank_pattern") or {}).values()]
    return max(ranks)


def _named_by(key: str, module: str) -> bool:
    """PEFT's get_pattern_key, and vLLM's."""
    return regex.match(rf"(.*\.)?({key})$", module, timeout=_MATCH_S) is not None


def patterns_in(config: Config) -> list[str]:
    """Fields of ``PATTERNS`` that the config uses."""
    return [field for field in PATTERNS if config.get(field)]


def alphas(config: Config) -> list[Any]:
    """Every alpha that the config has."""
    return [config.get("lora_alpha"), *(config.get("alpha_pattern") or {}).values()]
