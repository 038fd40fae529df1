"""From what a user calls an adapter to a local directory: a path, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from icarus.errors import AdapterError
from icarus.fingerprint import StrPath
from icarus.verify import CARD, CONFIG, PICKLE, WEIGHTS


def local_directory(source: StrPath, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The adapter's directory; a local path wins over a repository of that name, which is fetched."""
    path = Path(source).expanduser()
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        return path
    from huggingface_hub import snapshot_download

    files = [CONFIG, WEIGHTS, PICKLE, CARD]
    try:
        return Path(snapshot_download(str(source), revision=revision, token=token, allow_patterns=files))
    except (OSError, ValueError) as error:
        why = str(error).strip().partition("\n")[0].rstrip(".")
        raise AdapterError(
            f"{source} is no local folder and could not be fetched from the Hub ({why}): check name and connection."
        ) from error
