"""The options of ``icarus bench agents``, and the settings that they make of a profile."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from icarus.bench.profiles import BUDGETS, PROFILES, QUICK, SYSTEMS, Settings
from icarus.bench.workloads import MAKERS, Sizes
from icarus.errors import InputError


def add(parser: argparse.ArgumentParser) -> None:
    """Add all options; what is not given is the profile's."""
    parser.add_argument("--profile", choices=sorted(PROFILES), default="cpu", help="settings to start from")
    parser.add_argument(
        "--quick", action="store_true", help="the most telling runs alone: under ten minutes on 2 cores"
    )
    parser.add_argument("--output", metavar="DIR", default="bench-agents", help="raw runs, report and plots; resumed")
    parser.add_argument("--redraw", action="store_true", help="only make the report of --output again")
    parser.add_argument("--base", help="hub id, folder or packaged model")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS)
    parser.add_argument("--models", nargs="+", type=_from_one, metavar="N", help="numbers of models")
    parser.add_argument("--workloads", nargs="+", choices=list(MAKERS), help="the first is swept over the rates")
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, help="KV budgets; rates are swept with the first")
    parser.add_argument("--rates", nargs="+", type=_rate, metavar="R", help="arriving workflows a second")
    parser.add_argument("--trajectories", metavar="FILE", help="recorded runs for plan-act-reflect (JSON lines)")
    for name, help in (
        ("workflows", "workflows in a run"),
        ("repeats", "runs of each kind; the order of systems alternates"),
        ("rank", "rank of all adapters"),
        ("tight-tokens", "KV budget in tokens"),
        ("roomy-tokens", "KV budget in tokens"),
        ("block-size", "tokens in a block of KV"),
        ("max-model-len", "of the server"),
        ("max-num-seqs", "of the server"),
        ("max-num-batched-tokens", "of the server"),
    ):
        parser.add_argument(f"--{name}", type=_from_one, metavar="N", help=help)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--start-seconds", type=float, help="how long a server may take to start")
    parser.add_argument(
        "--serve-flags", metavar="FLAGS", help="flags of `vllm serve` in place of the profile's, one word"
    )
    for field in fields(Sizes):
        help = f"{field.name} tokens" if field.name != "turns" else "calls of a workflow"
        parser.add_argument(f"--{_size(field.name)}", type=_count, metavar="N", dest=f"size_{field.name}", help=help)


def settings(options: argparse.Namespace) -> Settings:
    """The profile with what was given in place of its own; raises InputError for what does not fit together."""
    if options.quick and options.profile != "cpu":
        raise InputError(
            "--quick is a part of the CPU profile; for another one give --models, --workloads and --rates."
        )
    profile = QUICK if options.quick else PROFILES[options.profile]
    given = vars(options)
    changes: dict[str, Any] = {
        field.name: tuple(value) if isinstance(value, list) else value
        for field in fields(Settings)
        if (value := given.get(field.name)) is not None
    }
    sizes = {field.name: value for field in fields(Sizes) if (value := given[f"size_{field.name}"]) is not None}
    if options.serve_flags is not None:
        changes["serve_flags"] = tuple(shlex.split(options.serve_flags))
    if options.trajectories:
        changes["trajectories"] = str(Path(options.trajectories).resolve())
    try:
        found = replace(profile, **changes, sizes=replace(profile.sizes, **sizes))
    except ValueError as error:
        raise InputError(f"The sizes do not fit: {error}.") from error
    for name in ("systems", "models", "workloads", "budgets", "rates"):
        if len(set(getattr(found, name))) < len(getattr(found, name)):
            raise InputError(f"--{name} names one twice; give each once.")
    return found


def _size(name: str) -> str:
    return "turns" if name == "turns" else f"{name}-tokens"


def _from_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of workflows a second")
    return rate
