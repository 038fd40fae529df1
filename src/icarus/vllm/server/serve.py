"""``icarus serve``: vLLM's server with verified specialists, and with defaults that suit them.

    icarus serve BASE --adapters name=path ... [any flag of vllm serve]

Flags that are not ours go to vLLM unchanged. The process then becomes vLLM's own: ``vllm serve`` with the flags and
variables of ``plan.py``, and the plugin, which vLLM finds by its entry point, would be the same server.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from icarus import arguments, packaged_model
from icarus.errors import InputError
from icarus.vllm.server import names
from icarus.vllm.server.flags import address, given, value
from icarus.vllm.server.plan import Plan, plan


def add_arguments(parser: arguments.Parser) -> None:
    """Our options; all other flags are vLLM's."""
    parser.pass_on()
    parser.usage = (
        "icarus serve BASE [--adapters NAME=PATH ...] [--adapter-dir DIR] [--allow-adapters-from DIR] "
        "[--read-kv-once] [any flag of vllm serve]"
    )
    parser.description = "Serve a base model and its specialists from one KV cache, with vLLM."
    parser.epilog = "All other flags are vLLM's; python -m vllm.entrypoints.openai.api_server --help=all lists them."
    names = " or ".join(packaged_model.NAMES)
    parser.add_argument("base", metavar="BASE", help=f"hub id, folder, {names}")
    parser.add_argument(
        "--adapters",
        nargs="+",
        action=arguments.NamedPaths,
        default={},
        metavar="NAME=PATH",
        help="specialists and conventional adapters; repeatable",
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
        help="clients may load adapters from here, besides the folders that hold those of --adapters; repeatable",
    )
    parser.add_argument(
        "--read-kv-once",
        action="store_true",
        help="on GPUs, attention reads a request's keys and values once for both of its rows (not measured yet)",
    )


def run(options: argparse.Namespace) -> None:
    """Serve until a signal ends it.

    Raises:
        InputError: something cannot be served; said before the engine starts.
    """
    _check_order(options)
    _need_vllm()
    options.rest = [*options.rest, *_chosen_port(options.rest)]
    planned = plan(options, os.environ)
    _check_port(options.rest)
    os.environ.update(planned.environment)  # vLLM reads some of it when it is imported
    for served in planned.adapters:
        names.check_name(served.name)
    print(announcement(planned, options.rest), flush=True)
    _start_vllm(["serve", planned.model, *planned.flags])


# ------------------------------------------------------------------------------------------------- checks


def _check_order(options: argparse.Namespace) -> None:
    """A value behind a flag of vLLM's looks like BASE, so BASE comes first."""
    words, rest = options.words, options.rest
    if rest and words.index(rest[0]) < words.index(options.base):
        raise InputError(f"BASE comes before {rest[0]}: icarus serve BASE --adapters NAME=PATH ... [flags of vLLM].")


def _need_vllm() -> None:
    try:
        spec = importlib.util.find_spec("vllm.entrypoints")
    except ImportError:
        spec = None
    if spec is None:
        raise InputError(
            "Serving needs vLLM; run: pip install 'icarus-llm[cpu]' on a machine without a GPU, or "
            "'icarus-llm[gpu]' on one with an NVIDIA GPU."
        )


def _chosen_port(words: Sequence[str]) -> list[str]:
    """A free port as a flag where the user asks for any, with 0: vLLM never says which one it got."""
    host, port = address(words)
    if port or given(words) & {"uds", "headless"}:
        return []
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind(("" if host == "localhost" else host, 0))
        except OSError:  # vLLM says what is wrong with the host
            return []
        return ["--port", str(probe.getsockname()[1])]


def _check_port(words: Sequence[str]) -> None:
    """Raise InputError if the port is taken, which vLLM would find out only after its start."""
    if given(words) & {"uds", "headless"}:
        return
    host, port = address(words)
    if ":" in host:  # IPv6
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("" if host == "localhost" else host, port))
        except (OSError, OverflowError) as error:
            raise InputError(f"Port {port} is unavailable ({error}); choose another with --port.") from error


# ------------------------------------------------------------------------------------------------- start


def announcement(planned: Plan, words: Sequence[str]) -> str:
    """What is shared and why, where the metrics are, and how to ask. ``words`` are for vLLM."""
    mark = next((served.base_fingerprint[:12] for served in planned.adapters if served.base_fingerprint), "")
    lines = [f"{planned.base}{f' (fingerprint {mark})' if mark else ''} writes the KV cache"]
    width = max((len(served.name) for served in planned.adapters), default=0)
    for served in planned.adapters:
        why = (
            f"shares it     ICaRus adapter of this base model, rank {served.rank}"
            if served.base_fingerprint
            else f"its own cache conventional adapter (no ICaRus marker), rank {served.rank}"
        )
        lines.append(f"  {served.name:{width}}  {why}")
    if planned.watched:
        lines.append(f"  adapters in {planned.watched} come and go with their folders")
    if planned.dtype:
        lines.append(f"dtype    {planned.dtype.dtype}, {planned.dtype.reason}; --dtype says otherwise")
    return "\n".join(lines if "headless" in given(words) else [*lines, *_how_to_ask(planned, words)])


def _how_to_ask(planned: Plan, words: Sequence[str]) -> list[str]:
    """For people, with words that no log of a running server has: scripts look for those."""
    host, port = address(words)
    host = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
    url = f"{'https' if 'ssl-certfile' in given(words) else 'http'}://{host}:{port}"
    curl = "curl"
    if socket_path := value(words, "uds", ""):
        curl, url = f"curl --unix-socket {shlex.quote(socket_path)}", "http://localhost"
    asked = curl
    if "api-key" in given(words) or os.environ.get("VLLM_API_KEY"):
        asked += ' -H "Authorization: Bearer $VLLM_API_KEY"'
    model = planned.adapters[0].name if planned.adapters else planned.names[0]
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]}, ensure_ascii=False)
    return [
        f"metrics  {url}/metrics (icarus:* beside vllm:*)",
        f"ready    when `{curl} {url}/health` succeeds; the first start compiles for a minute or two",
        f"ask      {asked} {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}",
    ]


def _start_vllm(words: list[str]) -> None:
    """``vllm serve``, as vllm/entrypoints/cli/main.py runs it.

    That file itself asks for a distribution named vllm, which the CPU build is not.
    """
    sys.argv = ["vllm", *words]  # vLLM's data-parallel supervisor starts processes with it
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.startup import cli_env_setup
    except ImportError:  # before 0.33
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

    cli_env_setup()
    parser = FlexibleArgumentParser(description="vLLM CLI")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    options = parser.parse_args(words)
    configure_logging_from_args(options)
    command.validate(options)
    command.cmd(options)
