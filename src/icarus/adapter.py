"""The adapters of a model in memory: make, save, load. The only file of the project that imports PEFT.

``icarus.verify`` tells what an adapter directory is. What this file promises:

* ``attach``, ``save`` and ``load`` let nothing through that must not share a KV cache (``problems`` lists why);
* ``save`` is atomic: whatever happens, the directory holds the old adapter or the new one, whole;
* a failed ``attach`` or ``load`` leaves the model as it was.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from icarus import atomic, hub, undo
from icarus import card as model_card
from icarus.errors import AdapterError, UnsupportedModelError
from icarus.fingerprint import StrPath, base_of, fingerprint
from icarus.projections import linears
from icarus.verify import (
    CARD,
    CONFIG,
    MARKER_VERSION,
    PICKLE,
    WEIGHTS,
    AdapterInfo,
    feeds_kv,
    is_icarus,
    problems,
    read_tensors,
    setting_problems,
)
from icarus.verify import verify as verify_directory

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from peft import LoraConfig, PeftModel

__all__ = [
    "MARKER_VERSION",
    "AdapterInfo",
    "attach",
    "attach_conventional",
    "check_attached",
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

verify = verify_directory  # the public name; in ``load``, ``verify`` is the caller's choice whether to do so

_ROUTERS = {"gate", "router", "router_gate", "modality_router", "wg", "shared_expert_gate"}


def decoder_targets(model: nn.Module) -> list[str]:
    """Default LoRA targets, sorted: the names of all linear projections in the layers except those that feed K or V.

    That is PEFT's 'all-linear' (so no lm_head and no embeddings) without K, V and routers. Where PEFT would turn a
    name into expert tensors (for example ``up_proj`` in Qwen3-MoE) it is left out, as those are no projections.
    Raises UnsupportedModelError where nothing is left.
    """
    leaves = {name.rpartition(".")[2] for name in linears(model) if re.search(r"\.\d+\.", name)}
    candidates = {leaf for leaf in leaves if not feeds_kv(leaf)} - _ROUTERS
    targets = sorted(leaf for leaf in candidates if not _means_experts(model, leaf))
    if not targets:
        raise UnsupportedModelError(
            f"{type(base_of(model)).__name__} has no linear projection besides those that feed K and V: ICaRus needs "
            "separate ones, so choose another base model."
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
    """A fresh, trainable, active ICaRus adapter on a causal LM, plain or with other adapters; the base is frozen.

    Without ``config`` the adapter is plain LoRA of ``rank``, ``alpha`` (default: twice the rank), ``dropout`` and
    ``targets`` (default: ``decoder_targets``); with it those arguments are not read. A config without targets gets the
    default ones, and the caller's object is not changed. New modules are in training mode if the model is.

    Raises AdapterError for a setting that ICaRus cannot serve, and UnsupportedModelError where the targets resolve to
    a projection that feeds K or V; the model is then as it was.
    """
    from peft import PeftModel, get_peft_model

    _check_name(model, name)
    if name in names(model):
        raise AdapterError(f"The model already has an adapter {name!r}: choose another name or delete that one.")
    config = copy.deepcopy(config) if config else _lora(rank, alpha, dropout, targets)
    config.task_type = config.task_type or "CAUSAL_LM"
    config.target_modules = config.target_modules or decoder_targets(model)
    _check_settings(config, name)
    modes = _modes(model)
    with _peft(model, f"PEFT cannot attach adapter {name!r}"):
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
            model.set_adapter(name)
            adapted = model
        else:
            adapted = get_peft_model(model, config, adapter_name=name)
        check_attached(adapted, name)
        _set_modes(adapted, modes, new=modes[model])
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
    from peft import PeftModel, get_peft_model

    config = _lora(rank, alpha, dropout, targets or "all-linear")
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        return model
    return get_peft_model(model, config, adapter_name=name)


def _lora(rank: int, alpha: int | None, dropout: float, targets: Sequence[str] | str | None) -> LoraConfig:
    from peft import LoraConfig

    alpha = 2 * rank if alpha is None else alpha
    names = targets if isinstance(targets, str) or targets is None else list(targets)
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, task_type="CAUSAL_LM")


def _check_name(model: nn.Module, name: str) -> None:
    """PEFT builds module paths and file names from adapter names and finds them again by substring."""
    reserved = {"lora_A", "lora_B", "base_layer", "base_model", "weight", "bias"}
    parts = {part for path, _ in base_of(model).named_modules() if ".lora_" not in path for part in path.split(".")}
    if not name or re.search(r"[./\\\0]", name) or hasattr(nn.ModuleDict(), name) or name in reserved | parts:
        raise AdapterError(f"{name!r} cannot name an adapter in PEFT: choose a plain word that names no module.")


def _check_settings(config: Any, name: str) -> None:
    if found := setting_problems(vars(config)):
        raise AdapterError(f"Adapter {name!r} cannot be attached: {found[0]}.")


def check_attached(model: Any, name: str) -> None:
    """Refuses an attached adapter that ICaRus cannot serve, by what its targets became on this model."""
    modules = [(path, module) for path, module in base_of(model).named_modules() if ".lora_" not in path]
    kinds = ("lora_A", "lora_embedding_A")
    adapted = [path for path, module in modules if any(name in getattr(module, kind, ()) for kind in kinds)]
    if kv := [path for path in adapted if feeds_kv(path)]:
        leaves = ", ".join(sorted({path.rpartition(".")[2] for path in kv}))
        raise UnsupportedModelError(
            f"The targets of adapter {name!r} resolve to {leaves} ({kv[0]}), which feed K and V: leave them out, for "
            f"example with target_modules={decoder_targets(model)}."
        )
    _check_settings(model.peft_config[name], name)  # PEFT may have rewritten them for this model
    if odd := sorted(set(adapted) - linears(model).keys()):
        raise AdapterError(f"Adapter {name!r} targets {odd[0]}, which is no linear projection: leave it out.")
    if merged := [path for path, module in modules if getattr(module, "merged_adapters", ())]:
        raise AdapterError(
            f"An adapter is merged into {merged[0]}, so the base weights are not the base model's: call "
            "unmerge_adapter() first."
        )
    if variants := [path for path, module in modules if name in getattr(module, "lora_variant", ())]:
        raise AdapterError(f"Adapter {name!r} is a variant of LoRA on {variants[0]}: retrain it as plain LoRA.")


def _modes(model: nn.Module) -> dict[nn.Module, bool]:
    return {module: module.training for module in model.modules()}


def _set_modes(model: nn.Module, modes: Mapping[nn.Module, bool], *, new: bool) -> None:
    """PEFT makes modules (dropout) in training mode, and puts the whole model into evaluation mode as it loads."""
    for module in model.modules():
        module.training = modes.get(module, new)


@contextmanager
def _peft(model: nn.Module, failure: str) -> Iterator[None]:
    """PEFT's errors as ours, with the model as it was.

    Silent about what PEFT warns of needlessly: our marker as an unknown field, another adapter becoming active while
    one is replaced, and names like 'a', after which it may not find tensors (``_check_loaded`` makes sure of that).
    """
    expected = r"Adapter name .* prefix|Unexpected keyword arguments \['icarus'\]|Adapter .* was active"
    try:
        with undo.on_error(model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=expected)
            yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, re.error, SafetensorError) as error:
        raise AdapterError(f"{failure}: {error}") from error


def save(
    model: PeftModel,
    directory: StrPath,
    *,
    name: str = "default",
    base_fingerprint: str | None = None,
    card: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes adapter ``name`` as an ICaRus adapter directory, atomically, and returns the directory.

    ``base_fingerprint`` defaults to the model's own; ``card`` adds fields to the model card's front matter (a list of
    ``tags`` is joined); ``dtype`` is that of the stored tensors, by default the one in memory; ``state_dict`` is the
    model's, where it had to be gathered from several processes (FSDP). Other files in the directory are kept; config,
    weights, model card and an ``adapter_model.bin`` are replaced.

    Raises AdapterError, with the directory untouched, for an adapter that ``problems`` refuses (NaN, a target that
    feeds K or V, ...).
    """
    target = Path(directory).expanduser().resolve()
    if name not in names(model):
        raise AdapterError(f"The model has no adapter {name!r} to save: it has {', '.join(names(model)) or 'none'}.")
    with atomic.replacing(target, key=CONFIG, obsolete=[PICKLE]) as folder:
        _write(model, folder, name, dtype, state_dict)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if isinstance(config["target_modules"], list):
            config["target_modules"].sort()  # a set in memory; equal adapters shall give equal files
        config["icarus"] = {"version": MARKER_VERSION, "base_fingerprint": base_fingerprint or fingerprint(model)}
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (folder / CARD).write_text(model_card.text(config, card or {}), encoding="utf-8")
        if found := problems(folder):
            raise AdapterError(f"Adapter {name!r} is not saved to {target}: {found[0]}.")
    return target


def save_conventional(
    model: PeftModel,
    directory: StrPath,
    *,
    dtype: torch.dtype | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes a conventional adapter as a plain PEFT directory, atomically as ``save`` does; returns the directory."""
    target = Path(directory).expanduser().resolve()
    with atomic.replacing(target, key=CONFIG, obsolete=[PICKLE]) as folder:
        _write(model, folder, "default", dtype, state_dict)
    return target


def _write(
    model: PeftModel, folder: Path, name: str, dtype: torch.dtype | None, state_dict: Mapping[str, Tensor] | None
) -> None:
    """PEFT's own files, without the subfolder that it gives to other names than 'default'."""
    whole = model.state_dict() if state_dict is None else state_dict
    state: Any = {k: v.to(dtype) if dtype and ".lora_" in k else v for k, v in whole.items()}
    model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False, state_dict=state)
    if name != "default":
        for file in list((folder / name).iterdir()):
            file.rename(folder / file.name)
        (folder / name).rmdir()
    mode = (folder / CONFIG).stat().st_mode
    (folder / WEIGHTS).chmod(mode)  # safetensors writes files that only their owner can read


def load(
    model: nn.Module,
    source: StrPath,
    name: str = "default",
    *,
    verify: bool = True,
    base_fingerprint: str | None = None,
    is_trainable: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> PeftModel:
    """Attaches an adapter directory, or a Hub repository (a local path wins), as ``name``; returns the PEFT model.

    An adapter of that name is replaced, and stays active if it was. Like PEFT, the first adapter of a model becomes
    active and a further one does not. ``base_fingerprint``, where it is known, saves hashing the model.
    ``verify=False`` skips the checks, and so takes conventional adapters. New modules are in training mode if the
    model is. Raises AdapterError, the model as it was.
    """
    from peft import PeftModel

    _check_name(model, name)
    directory = hub.local_directory(source, revision, token)
    if verify:
        verify_directory(directory, model, base_fingerprint=base_fingerprint)
    modes = _modes(model)
    options: dict[str, Any] = {"adapter_name": name, "is_trainable": is_trainable, "torch_device": "cpu"}
    with _peft(model, f"{directory} could not be loaded as {name!r} (see `icarus verify`)"):
        if isinstance(model, PeftModel):
            adapted, active = model, list(model.active_adapters)
            if name in names(model):
                model.delete_adapter(name)
            model.load_adapter(str(directory), **options)
            if active == [name]:
                model.set_adapter(name, inference_mode=not is_trainable)
            elif name in active:
                tuner: Any = model.base_model  # takes several names, unlike the PeftModel
                tuner.set_adapter(active, inference_mode=not is_trainable)
        else:
            adapted = PeftModel.from_pretrained(model, str(directory), **options)
        _check_loaded(adapted, directory, name)
        _set_modes(adapted, modes, new=modes[model])
    return adapted


def _check_loaded(model: PeftModel, directory: Path, name: str) -> None:
    """PEFT only warns of tensors that it did not find a place for."""
    from peft import get_peft_model_state_dict

    loaded = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    for key, tensor in read_tensors(directory).items():
        if key not in loaded or not torch.equal(loaded[key].detach().cpu().float(), tensor.float()):
            raise AdapterError(f"{directory}: PEFT did not load {key}: use a base model of the right kind.")


def from_pretrained(
    model: nn.Module,
    model_id: StrPath,
    adapter_name: str = "default",
    is_trainable: bool = False,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> PeftModel:
    """``load`` under the name and with the arguments of ``PeftModel.from_pretrained``."""
    return load(model, model_id, adapter_name, is_trainable=is_trainable, revision=revision, token=token)


def push_to_hub(
    model: PeftModel,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload ICaRus adapter",
    create_pr: bool = False,
    **saving: Any,
) -> CommitInfo:
    """Saves the adapter (``saving``: see ``save``) and uploads it to a Hub repository, made where it is missing."""
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        written = save(model, Path(folder, "adapter"), **saving)
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id, folder_path=written, revision=revision, commit_message=commit_message, create_pr=create_pr
        )
