"""From a name to a loaded base model: a Hugging Face id, a local folder, or a packaged small model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icarus import arguments, hub, packaged_model
from icarus.errors import InputError, first_line
from icarus.packaged_model import PACKAGED

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``icarus base``."""
    parser.add_argument(
        "name",
        nargs="?",
        default=PACKAGED,
        metavar="BASE",
        help=f"hub id, folder, {PACKAGED} (default), or {packaged_model.PREPARED}, that of the shipped specialists",
    )
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """``icarus base``: print the folder of a base model."""
    directory = folder(options.name)
    print(directory)
    return {"name": options.name, "folder": str(directory)}


def resolve(name: str = PACKAGED) -> str:
    """What Transformers can load for ``name``: a folder (a packaged model is unpacked on first use) or a hub id.

    Raises:
        InputError: ``name`` is neither, or the packaged model cannot be unpacked.
    """
    if name in packaged_model.NAMES:
        return str(packaged_model.folder(name))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{folder} is not a model folder, as it has no config.json; give the folder of a saved model."
            )
        return str(folder)
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        others = ", ".join(map(repr, packaged_model.NAMES))
        raise InputError(f"Base model {name!r} is neither a folder nor a hub id; try {others} or owner/name.")
    return name


def folder(name: str = PACKAGED) -> Path:
    """The local folder of a base model; a hub id is downloaded to the Hugging Face cache.

    Raises:
        InputError: there is no such model, or it cannot be downloaded.
    """
    resolved = resolve(name)
    if Path(resolved).is_dir():
        return Path(resolved)
    try:
        return hub.snapshot(resolved, ["*.json", "*.safetensors", "*.jinja", "*.model"])
    except hub.DownloadError as error:
        raise InputError(
            f"Base model {name!r} could not be downloaded from the Hub ({error}); check its name and the connection."
        ) from error


def load(
    name: str = PACKAGED, *, dtype: str | torch.dtype = "auto", device: str | torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model in evaluation mode, and its tokenizer.

    Args:
        name: hub id, local folder, or ``PACKAGED``.
        dtype: a torch dtype or its name; ``auto`` is the checkpoint's, but float32 on a CPU, where it is faster.
        device: where to put the weights; default CUDA if there is one, else the CPU.

    Raises:
        InputError: the model is missing, damaged or cannot be downloaded.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype == "auto" and target.type == "cpu":
        dtype = torch.float32
    source = resolve(name)
    try:
        auto: Any = AutoModelForCausalLM  # typed as if output_loading_info did not exist
        model, loading = auto.from_pretrained(source, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"Base model {name!r} could not be loaded ({first_line(error)}); check its name and files."
        ) from error
    if missing := sorted(loading["missing_keys"]):  # which Transformers would fill with random weights
        raise InputError(f"Base model {name!r} lacks {len(missing)} tensor(s), {missing[0]} first; fetch it again.")
    if name in packaged_model.NAMES:  # adapters record it as their base: a name, and not a folder of this machine
        model.name_or_path = model.config._name_or_path = name
    return model.to(target).eval(), tokenizer
