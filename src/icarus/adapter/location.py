"""From what a user calls an adapter to a local directory: a path, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from icarus import hub
from icarus.adapter.files import CARD_NAME, CONFIG_NAME, PICKLE_NAME, PICKLE_NAMES, WEIGHTS_NAME, StrPath
from icarus.errors import AdapterError


def locate(source: StrPath, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The adapter's directory; a local path wins over a repository of that name, which is downloaded.

    Raises:
        AdapterError: there is no such folder, and the repository could not be downloaded.
    """
    path = Path(source).expanduser()
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        return path
    try:
        return hub.snapshot(
            str(source), [CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME, CARD_NAME], revision=revision, token=token
        )
    except hub.DownloadError as error:
        raise AdapterError(
            f"{source} is not a local folder and could not be downloaded from the Hub ({error}); "
            "check its name and the connection."
        ) from error


def weights_name(directory: StrPath) -> str:
    """The file that vLLM reads an adapter's tensors from: a pickle where there is nothing else."""
    there = (name for name in (WEIGHTS_NAME, *PICKLE_NAMES) if (Path(directory) / name).is_file())
    return next(there, WEIGHTS_NAME)
