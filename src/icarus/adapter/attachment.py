"""Adapters on a loaded model: created there, and checked for what their targets became.

``attach`` lets nothing through that must not share a KV cache (``icarus.adapter.checks``). When it fails, the model is
as it was.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import nn

from icarus.adapter import undo
from icarus.adapter.checks import feeds_kv, setting_problems
from icarus.adapter.fingerprints import base_of
from icarus.adapter.projections import linears
from icarus.errors import AdapterError, UnsupportedModelError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

_ROUTERS = {"gate", "router", "router_gate", "modality_router", "wg", "shared_expert_gate"}


def decoder_targets(model: nn.Module) -> list[str]:
    """Default LoRA targets, sorted: the names of all linear projections in the layers except those that feed K or V.

    That is PEFT's 'all-linear' (so no lm_head and no embeddings) without K, V and routers. A name that PEFT would turn
    into expert tensors (for example ``up_proj`` in Qwen3-MoE) is left out, because those are not projections.

    Raises:
        UnsupportedModelError: nothing is left.
    """
    leaves = {name.rpartition(".")[2] for name in linears(model) if re.search(r"\.\d+\.", name)}
    candidates = {leaf for leaf in leaves if not feeds_kv(leaf)} - _ROUTERS
    targets = sorted(leaf for leaf in candidates if not _means_experts(model, leaf))
    if not targets:
        raise UnsupportedModelError(
            f"{type(base_of(model)).__name__} has no linear projection besides those that feed K and V, and ICaRus "
            "needs separate ones; choose another base model."
        )
    return targets


def _means_experts(model: nn.Module, target: str) -> bool:
    """Whether PEFT would rewrite the name to ``target_parameters``: experts that Transformers 5 merges on loading."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[target])
    try:
        convert_peft_config_for_transformers(config, model=base_of(model), conversions=None)
    except ValueError:  # one half of a fused pair
        return True
    return bool(config.target_parameters)


def names(model: nn.Module) -> list[str]:
    """Names of the attached adapters, in order of attachment."""
    return list(getattr(model, "peft_config", {}))


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
    """Attach a new, trainable, active ICaRus adapter to a causal LM, plain or with other adapters; freeze the base.

    New modules are in training mode if the model is.

    Args:
        model: a Transformers model or a ``PeftModel``.
        config: LoRA settings in place of ``rank``, ``alpha``, ``dropout`` and ``targets``. Without targets it gets the
            default ones; the caller's object is not changed.
        name: what the adapter is called in the model.
        rank: of the LoRA matrices.
        alpha: default: twice the rank.
        dropout: of the input of each LoRA layer.
        targets: names of modules, or a regular expression (default: ``decoder_targets``).

    Raises:
        AdapterError: a setting that ICaRus cannot serve; the model is as it was.
        UnsupportedModelError: the targets resolve to a projection that feeds K or V; the model is as it was.
    """
    from peft import PeftModel, get_peft_model

    check_name(model, name)
    if name in names(model):
        raise AdapterError(f"The model already has an adapter {name!r}; choose another name or delete that one.")
    config = copy.deepcopy(config) if config else _lora(rank, alpha, dropout, targets)
    config.task_type = config.task_type or "CAUSAL_LM"
    config.target_modules = config.target_modules or decoder_targets(model)
    _check_settings(config, name)
    modes = training_modes(model)
    with peft_errors(model, f"PEFT cannot attach adapter {name!r}"):
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
            model.set_adapter(name)
            adapted = model
        else:
            adapted = get_peft_model(model, config, adapter_name=name)
        check_attached(adapted, name)
        set_training_modes(adapted, modes, new=modes[model])
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
    """Attach the baseline: ordinary LoRA on all linear projections, K and V too, so each model needs its own cache."""
    from peft import PeftModel, get_peft_model

    config = _lora(rank, alpha, dropout, targets or "all-linear")
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        return model
    return get_peft_model(model, config, adapter_name=name)


def twin(model: nn.Module) -> nn.Module:
    """A second model of the same base weights, which are in memory once, without the adapters of the first.

    What is attached to one is not in the other, so each is run, trained and saved by itself.

    Raises:
        UnsupportedModelError: a function of the model was replaced, as trainers do, and would run the first one.
    """
    if replaced := [path for path, module in model.named_modules() if "forward" in vars(module)]:
        raise UnsupportedModelError(
            f"forward of {replaced[0] or type(model).__name__} was replaced, perhaps by a trainer, so the model cannot "
            "be run twice; load it anew."
        )
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    second: Any = copy.deepcopy(model, shared)
    return second.unload() if names(second) else second  # type: ignore[no-any-return]


def _lora(rank: int, alpha: int | None, dropout: float, targets: Sequence[str] | str | None) -> LoraConfig:
    from peft import LoraConfig

    alpha = 2 * rank if alpha is None else alpha
    names = targets if isinstance(targets, str) or targets is None else list(targets)
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, task_type="CAUSAL_LM")


def check_name(model: nn.Module, name: str) -> None:
    """Refuse a name that confuses PEFT, which makes it a part of paths and looks for it as a substring."""
    reserved = {"lora_A", "lora_B", "base_layer", "base_model", "weight", "bias"}
    parts = {part for path, _ in base_of(model).named_modules() if ".lora_" not in path for part in path.split(".")}
    if not name or re.search(r"[./\\\0]", name) or hasattr(nn.ModuleDict(), name) or name in reserved | parts:
        raise AdapterError(f"{name!r} cannot name an adapter in PEFT; choose a plain word that names no module.")


def _check_settings(config: Any, name: str) -> None:
    if refusals := setting_problems(vars(config)):
        raise AdapterError(f"Adapter {name!r} cannot be attached: {refusals[0]}.")


def check_attached(model: Any, name: str) -> None:
    """Refuse an attached adapter that ICaRus cannot serve, by what its targets became on this model.

    Raises:
        AdapterError: a setting or a target that cannot be served, or an adapter that is merged.
        UnsupportedModelError: a target feeds K or V.
    """
    modules = [(path, module) for path, module in base_of(model).named_modules() if ".lora_" not in path]
    kinds = ("lora_A", "lora_embedding_A")
    adapted = [path for path, module in modules if any(name in getattr(module, kind, ()) for kind in kinds)]
    if kv := [path for path in adapted if feeds_kv(path)]:
        leaves = ", ".join(sorted({path.rpartition(".")[2] for path in kv}))
        raise UnsupportedModelError(
            f"The targets of adapter {name!r} resolve to {leaves} ({kv[0]}), which feed K and V; leave them out, for "
            f"example with target_modules={decoder_targets(model)}."
        )
    _check_settings(model.peft_config[name], name)  # PEFT may have rewritten them for this model
    if odd := sorted(set(adapted) - linears(model).keys()):
        raise AdapterError(f"Adapter {name!r} targets {odd[0]}, which is not a linear projection; leave it out.")
    if merged := [path for path, module in modules if getattr(module, "merged_adapters", ())]:
        raise AdapterError(
            f"An adapter is merged into {merged[0]}, so the base weights are not the base model's; call "
            "unmerge_adapter() first."
        )
    if variants := [path for path, module in modules if name in getattr(module, "lora_variant", ())]:
        raise AdapterError(f"Adapter {name!r} is not plain LoRA on {variants[0]}; retrain it as such.")


def training_modes(model: nn.Module) -> dict[nn.Module, bool]:
    """Which modules are in training mode; for ``set_training_modes``."""
    return {module: module.training for module in model.modules()}


def set_training_modes(model: nn.Module, modes: Mapping[nn.Module, bool], *, new: bool) -> None:
    """Undo PEFT's: it creates modules (dropout) in training mode, and loading puts the model into evaluation mode."""
    for module in model.modules():
        module.training = modes.get(module, new)


@contextmanager
def peft_errors(model: nn.Module, failure: str) -> Iterator[None]:
    """Raise PEFT's errors as ours, with the model as it was.

    Needless warnings of PEFT are silenced: our marker is an unknown field, another adapter becomes active while one is
    replaced, and tensors may be missed or missing (``_check_loaded`` makes sure that none is).
    """
    expected = r"Adapter name .* prefix|Unexpected keyword arguments \['icarus'\]|Adapter .* was active"
    expected += "|Found missing adapter keys"
    try:
        with undo.on_error(model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=expected)
            yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, re.error, SafetensorError) as error:
        raise AdapterError(f"{failure}: {error}") from error
