"""``icarus serve``: vLLM's server with specialists that were verified, and defaults that suit them.

    icarus serve BASE --adapters name=path ... [any flag of vllm serve]

Flags that are not listed here go to vLLM as they are; the defaults that are set for them give way to what the user says
on the command line or in vLLM's ``--config`` file. From there on it is vLLM's own process: ``vllm serve`` with these
flags and variables, and the plugin that vLLM finds by its entry point, would be the same server.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from icarus import adapter, arguments, base_model, vllm_environment
from icarus.errors import InputError
from icarus.vllm.server import folders, watch

MIN_LORA_SLOTS = 8
"""Least number of adapters that can be in one step (``--max-loras``)."""

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for ``--max-lora-rank`` (``MaxLoRARanks`` in vllm/config/lora.py)."""

DEFAULT_RANK = 16

PLUGIN_NAME = "icarus"  # the name of the entry point
MIDDLEWARE = "icarus.vllm.server.middleware.Middleware"


@dataclass(frozen=True)
class Served:
    """One adapter that is loaded at the start."""

    name: str
    folder: Path
    rank: int
    base_fingerprint: str  # empty for a conventional adapter


@dataclass
class Plan:
    """What is served and how vLLM is called."""

    base: str  # as the user calls it
    model: str  # as vLLM finds it
    adapters: list[Served] = field(default_factory=list)
    watched: Path | None = None
    flags: list[str] = field(default_factory=list)  # for vLLM
    environment: dict[str, str] = field(default_factory=dict)


def run(options: argparse.Namespace) -> None:
    """Serve until a signal ends it. Raises InputError for what cannot be served, before the engine starts."""
    _need_vllm()
    made = plan(options, os.environ)
    _check_port(options.rest)
    print(announcement(made, options.rest), flush=True)
    os.environ.update(made.environment)
    _serve(["serve", made.model, *made.flags])


def _check_port(rest: Sequence[str]) -> None:
    """Raise InputError where another server listens, which vLLM would find out after its start-up."""
    if given(rest) & {"uds", "headless", "config"}:
        return
    host, port = _address(rest)
    if ":" in host:  # IPv6
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("" if host == "localhost" else host, int(port)))
        except (OSError, ValueError) as error:
            raise InputError(f"Port {port} cannot be had ({error}); choose another with --port.") from error


def _address(rest: Sequence[str]) -> tuple[str, str]:
    """Host and port that the user gave, or vLLM's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", default="8000")
    where = parser.parse_known_args(list(rest))[0]
    return where.host, where.port


def _serve(words: list[str]) -> None:
    """``vllm serve``, as vllm/entrypoints/cli/main.py runs it; that file asks for a distribution named vllm, which the
    CPU build is not."""
    sys.argv = ["vllm", *words]  # vLLM's data-parallel supervisor starts processes with it
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(description="vLLM CLI")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    arguments = parser.parse_args(words)
    configure_logging_from_args(arguments)
    command.validate(arguments)
    command.cmd(arguments)


def _need_vllm() -> None:
    try:
        found = importlib.util.find_spec("vllm.entrypoints")
    except ImportError:
        found = None
    if found is None:
        raise InputError(
            "Serving needs vLLM; run: pip install 'icarus-llm[cpu]' on a machine without a GPU, or "
            "'icarus-llm[gpu]' on one with NVIDIA's."
        )


# ------------------------------------------------------------------------------------------------- the command line


def add_arguments(parser: arguments.Parser) -> None:
    """Our options; all other flags are vLLM's."""
    parser.pass_on()
    parser.usage = (
        "icarus serve BASE [--adapters NAME=PATH ...] [--adapter-dir DIR] [--allow-adapters-from DIR] "
        "[any flag of vllm serve]"
    )
    parser.description = "Serve a base model and its specialists from one KV cache, with vLLM."
    parser.epilog = "All other flags are vLLM's: vllm serve --help=all lists them."
    parser.add_argument("base", metavar="BASE", help=f"hub id, folder, or {base_model.PACKAGED}")
    parser.add_argument(
        "--adapters",
        nargs="+",
        action=arguments.NamedPaths,
        default={},
        metavar="NAME=PATH",
        help="specialists; repeatable",
    )
    parser.add_argument(
        "--adapter-dir",
        type=Path,
        metavar="DIR",
        help="serve the adapters in this folder under the names of their folders, and follow its changes",
    )
    parser.add_argument(
        "--allow-adapters-from",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="clients may load adapters from here, besides the folders beside those of --adapters; repeatable",
    )


def _base_comes_first(options: argparse.Namespace) -> None:
    """Behind a flag of vLLM's, a value of that flag would look like BASE."""
    words, rest = options.words, options.rest
    if rest and words.index(rest[0]) < words.index(options.base):
        raise InputError(f"BASE comes before {rest[0]}: icarus serve BASE --adapters NAME=PATH ... [flags of vLLM].")


def given(words: Iterable[str]) -> set[str]:
    """Names of the flags in vLLM's words and in its ``--config`` file, as in ``max-loras``."""
    listed = list(words)
    names = {word[2:].partition("=")[0].replace("_", "-") for word in listed if word.startswith("--")}
    if "-dp" in listed:
        names.add("data-parallel-size")
    if "config" in names:
        names |= {str(key).replace("_", "-") for key in _config(listed)}
    return names | {name.removeprefix("no-") for name in names}


def _config(words: list[str]) -> Mapping[str, Any]:
    import yaml

    after = [word.partition("=")[2] for word in words if word.startswith("--config=")]
    after += [value for word, value in pairwise(words) if word == "--config"]
    for path in after:
        try:
            read = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise InputError(f"--config {path} cannot be read ({error}); give vLLM a YAML file of flags.") from error
        return read if isinstance(read, dict) else {}
    return {}


# ------------------------------------------------------------------------------------------------- the plan


def plan(options: argparse.Namespace, environment: Mapping[str, str]) -> Plan:
    """Verify what is to be served, and decide how vLLM is called. Raises InputError."""
    _base_comes_first(options)
    rest: list[str] = options.rest
    present = given(rest)
    if "lora-modules" in present:
        raise InputError("--lora-modules is set by icarus serve; name the adapters with --adapters NAME=PATH.")
    made = Plan(options.base, base_model.resolve(options.base))
    # Of another revision only the engine has the weights; it verifies, too, and then at its start.
    base = None if "revision" in present else base_model.folder(options.base)
    for name, path in options.adapters.items():
        made.adapters.append(_served(name, adapter.locate(path).resolve(), base))
    if options.adapter_dir is not None:
        if not options.adapter_dir.is_dir():
            raise InputError(f"--adapter-dir {options.adapter_dir} is no folder; make it, or name another.")
        made.watched = options.adapter_dir.resolve()
    several = _several_servers(rest, present)
    if several and made.watched:
        raise InputError("--adapter-dir needs one API server: set --api-server-count 1.")
    made.flags = [*_flags(made, present), *rest]
    made.environment = _environment(made, options.allow_adapters_from, environment, loading=not several)
    return made


def _served(name: str, folder: Path, base: Path | None) -> Served:
    found = folders.describe(folder, base)
    return Served(name, folder, found.rank, found.base_fingerprint)


def _several_servers(rest: list[str], present: set[str]) -> bool:
    """Whether the user asked for more than one API server, which vLLM allows without loading at run time only."""
    if "api-server-count" not in present:
        return False
    named = {str(key).replace("_", "-"): value for key, value in _config(rest).items()}
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--api-server-count", "--api_server_count", "-asc", type=int)
    count = parser.parse_known_args(rest)[0].api_server_count
    return int(count if count is not None else named.get("api-server-count", 0)) > 1


def _flags(made: Plan, present: set[str]) -> list[str]:
    """Flags for vLLM that the user has not given."""
    ranks = [served.rank for served in made.adapters] + _ranks_in(made.watched)
    defaults = {
        "enable-lora": [],
        "max-loras": [str(max(MIN_LORA_SLOTS, len(ranks)))],
        "max-lora-rank": [str(allowed_rank(max(ranks, default=DEFAULT_RANK)))],
        "enable-prompt-tokens-details": [],
        "served-model-name": [made.base],
    }
    if "data-parallel-size" in present:  # vLLM would start one API server for each
        defaults["api-server-count"] = ["1"]
    flags = ["--middleware", MIDDLEWARE]
    if made.adapters:
        flags += ["--lora-modules", *(_module(made.base, served) for served in made.adapters)]
    for name, values in defaults.items():
        if name not in present:
            flags += [f"--{name}", *values]
    return flags


def _module(base: str, served: Served) -> str:
    return json.dumps({"name": served.name, "path": str(served.folder), "base_model_name": base})


def _ranks_in(watched: Path | None) -> list[int]:
    """Of the adapters that are sound; the others are reported when the server looks at them."""
    if watched is None:
        return []
    ranks = []
    for name in watch.scan(watched):
        try:
            ranks.append(folders.describe(watched / name, None).rank)
        except InputError:
            continue
    return ranks


def allowed_rank(rank: int) -> int:
    """The least value of ``--max-lora-rank`` with room for an adapter of this rank."""
    if rank > LORA_RANKS[-1]:
        raise InputError(f"vLLM serves ranks up to {LORA_RANKS[-1]} and an adapter has {rank}; retrain it with less.")
    return next(allowed for allowed in LORA_RANKS if allowed >= rank)


def _beside(served: Served) -> Path:
    """The folder that holds an adapter; of one that is in the root folder, the adapter alone."""
    parent = served.folder.parent
    return served.folder if parent == parent.parent else parent


def _environment(made: Plan, more: list[Path], current: Mapping[str, str], *, loading: bool) -> dict[str, str]:
    """Variables to set; vLLM's processes inherit them."""
    within = [*map(_beside, made.adapters), *more, *filter(None, [made.watched])]
    wanted = {
        folders.ALLOWED_VARIABLE: os.pathsep.join(dict.fromkeys(str(folder.resolve()) for folder in within)),
        **vllm_environment.variables(current),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": current.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", str(int(loading))),
        watch.WATCHED_VARIABLE: str(made.watched or ""),
    }
    if (plugins := current.get("VLLM_PLUGINS")) is not None and PLUGIN_NAME not in plugins.split(","):
        wanted["VLLM_PLUGINS"] = ",".join(filter(None, [plugins, PLUGIN_NAME]))
    return wanted


# ------------------------------------------------------------------------------------------------- what is said


def announcement(made: Plan, rest: Sequence[str]) -> str:
    """What is shared and why, where the metrics are, and how to ask."""
    host, port = _address(rest)
    address = f"http://{'localhost' if host in ('0.0.0.0', '::') else host}:{port}"
    mark = next((served.base_fingerprint[:12] for served in made.adapters if served.base_fingerprint), "")
    lines = [f"{made.base}{f' (fingerprint {mark})' if mark else ''} writes the KV cache"]
    width = max((len(served.name) for served in made.adapters), default=0)
    for served in made.adapters:
        why = (
            f"shares it     ICaRus adapter of this base model, rank {served.rank}"
            if served.base_fingerprint
            else f"its own cache conventional adapter (no ICaRus marker), rank {served.rank}"
        )
        lines.append(f"  {served.name:{width}}  {why}")
    if made.watched:
        lines.append(f"  adapters in {made.watched} come and go with their folders")
    asked = made.adapters[0].name if made.adapters else made.base
    body = json.dumps({"model": asked, "messages": [{"role": "user", "content": "Hello"}]})
    lines += [
        f"metrics  {address}/metrics (icarus:* beside vllm:*)",
        'ready    when "startup complete" is said below; the first start compiles for a minute or two',
        f"ask      curl {address}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
    ]
    return "\n".join(lines)
