"""Adapter directories: written from a model, and loaded into one.

* ``save`` is atomic: whatever happens, the directory holds the old adapter or the new one, whole.
* ``load`` lets nothing through that must not share a KV cache. When it fails, the model is as it was.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from icarus import atomic
from icarus.adapter import model_card, settings
from icarus.adapter.attachment import check_name, names, peft_errors, set_training_modes, training_modes
from icarus.adapter.checks import problems
from icarus.adapter.checks import verify as check_directory  # in ``load``, ``verify`` is the caller's choice
from icarus.adapter.files import (
    CARD_NAME,
    CONFIG_NAME,
    MARKER_VERSION,
    PICKLE_NAME,
    WEIGHTS_NAME,
    StrPath,
    read_tensors,
)
from icarus.adapter.fingerprints import fingerprint
from icarus.adapter.location import locate
from icarus.errors import AdapterError

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from peft import PeftModel


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
    """Write an adapter of a model as an ICaRus adapter directory, atomically; returns the directory.

    Config, weights, model card and an ``adapter_model.bin`` are replaced; other files in the directory are kept.

    Args:
        model: what holds the adapter.
        directory: where to write.
        name: the adapter's in the model.
        base_fingerprint: default: computed from the model.
        card: more fields for the model card's front matter; ``tags`` are added to ours.
        dtype: of the stored tensors (default: as in memory).
        state_dict: the model's, where it was gathered from several processes (FSDP).

    Raises:
        AdapterError: ``problems`` refuses the adapter (NaN, a target that feeds K or V, ...); the directory is as it
            was.
    """
    target = Path(directory).expanduser().resolve()
    if name not in names(model):
        raise AdapterError(f"The model has no adapter {name!r} to save: it has {', '.join(names(model)) or 'none'}.")
    with atomic.replacing(target, key=CONFIG_NAME, obsolete=[PICKLE_NAME]) as folder:
        _write(model, folder, name, dtype, state_dict)
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        if isinstance(config["target_modules"], list):
            config["target_modules"].sort()  # a set in memory; equal adapters give equal files
        config["icarus"] = {"version": MARKER_VERSION, "base_fingerprint": base_fingerprint or fingerprint(model)}
        _write_config(folder, config)
        (folder / CARD_NAME).write_text(model_card.text(config, card or {}), encoding="utf-8")
        if refusals := problems(folder):
            raise AdapterError(f"Adapter {name!r} is not saved to {target}: {refusals[0]}.")
    return target


def save_conventional(
    model: PeftModel,
    directory: StrPath,
    *,
    dtype: torch.dtype | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a conventional adapter as a plain PEFT directory, as atomically as ``save``; returns the directory."""
    target = Path(directory).expanduser().resolve()
    with atomic.replacing(target, key=CONFIG_NAME, obsolete=[PICKLE_NAME]) as folder:
        _write(model, folder, "default", dtype, state_dict)
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        (folder / CARD_NAME).write_text(model_card.conventional(config), encoding="utf-8")
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
    if patterns := settings.patterns_in(vars(model.peft_config[name])):
        # PEFT sorts their keys as it writes them, and the first one that matches counts.
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        _write_config(folder, config | {field: getattr(model.peft_config[name], field) for field in patterns})
    mode = (folder / CONFIG_NAME).stat().st_mode
    (folder / WEIGHTS_NAME).chmod(mode)  # safetensors writes files that only their owner can read


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    fields = {field: config[field] for field in sorted(config)}
    (folder / CONFIG_NAME).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


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
    """Attach the adapter of a directory or a Hub repository to a model; returns the PEFT model.

    As with PEFT, the first adapter of a model becomes active and further ones do not. An adapter of the same name is
    replaced, and stays active if it was. New modules are in training mode if the model is.

    Args:
        model: a Transformers model or a ``PeftModel``.
        source: a local path, which wins, or a repository.
        name: what the adapter is called in the model.
        verify: False skips the checks, and so takes conventional adapters.
        base_fingerprint: the model's, where it is known, which saves hashing.
        is_trainable: whether the adapter's parameters take gradients.
        revision: of the repository.
        token: for the Hub.

    Raises:
        AdapterError: the adapter is refused or cannot be loaded; the model is as it was.
    """
    from peft import PeftModel

    check_name(model, name)
    directory = locate(source, revision, token)
    if verify:
        check_directory(directory, model, base_fingerprint=base_fingerprint)
    modes = training_modes(model)
    options: dict[str, Any] = {"adapter_name": name, "is_trainable": is_trainable, "torch_device": "cpu"}
    with peft_errors(model, f"{directory} could not be loaded as {name!r} (see `icarus verify`)"):
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
        set_training_modes(adapted, modes, new=modes[model])
    return adapted


def _check_loaded(model: PeftModel, directory: Path, name: str) -> None:
    """PEFT only warns of tensors for which it did not find a place, and of places that got none."""
    from peft import get_peft_model_state_dict

    loaded = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = read_tensors(directory)
    if lacking := sorted(loaded.keys() - tensors.keys()):
        raise AdapterError(f"{directory} lacks {lacking[0]}; use the base model that the adapter was trained on.")
    for key, tensor in tensors.items():
        if key not in loaded or not torch.equal(loaded[key].detach().cpu().float(), tensor.float()):
            raise AdapterError(f"{directory}: PEFT did not load {key}; use a base model of the right kind.")


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
    """Save an adapter (``saving``: arguments of ``save``) and upload it to a Hub repository, created where missing."""
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        written = save(model, Path(folder, "adapter"), **saving)
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id, folder_path=written, revision=revision, commit_message=commit_message, create_pr=create_pr
        )
