"""What a user told vLLM: the flags behind ours on the command line, and vLLM's ``--config`` file."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from icarus.errors import InputError


def given(words: Iterable[str]) -> set[str]:
    """Names of the flags in vLLM's words and in its ``--config`` file, spelled as in ``max-loras``.

    Raises:
        InputError: the file cannot be read.
    """
    listed = list(words)
    names = {word[2:].partition("=")[0].replace("_", "-") for word in listed if word.startswith("--")}
    if "-dp" in listed:
        names.add("data-parallel-size")
    if "config" in names:
        names |= _config(listed).keys()
    return names | {name.removeprefix("no-") for name in names}


def address(words: Sequence[str]) -> tuple[str, str]:
    """Host and port that the user gave, or vLLM's own."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", default="8000")
    options = parser.parse_known_args(list(words))[0]
    return options.host, options.port


def several_servers(words: Sequence[str]) -> bool:
    """Whether the user asked for more than one API server; vLLM then loads no adapters at run time."""
    if "api-server-count" not in given(words):
        return False
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--api-server-count", "--api_server_count", "-asc", type=int)
    count = parser.parse_known_args(list(words))[0].api_server_count
    return int(count if count is not None else _config(words).get("api-server-count", 0)) > 1


def _config(words: Sequence[str]) -> Mapping[str, Any]:
    """The flags in vLLM's ``--config`` file, spelled as in ``max-loras``."""
    import yaml

    paths = [word.partition("=")[2] for word in words if word.startswith("--config=")]
    paths += [value for word, value in pairwise(words) if word == "--config"]
    if not paths:
        return {}
    try:
        content = yaml.safe_load(Path(paths[0]).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"--config {paths[0]} cannot be read ({error}); give vLLM a YAML file of flags.") from error
    return {str(key).replace("_", "-"): value for key, value in content.items()} if isinstance(content, dict) else {}
