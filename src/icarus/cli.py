"""The command ``icarus``. A part of the project is imported when its command is called, and not before."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from icarus.errors import CheckFailed, IcarusError, InputError

Command = Callable[[argparse.Namespace], dict[str, Any] | None]
_PACKAGED = "smollm2-135m-instruct"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a failed check, 2 for bad input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars are for a terminal
    try:
        if words[:1] == ["train"]:  # its flags are TRL's, several hundred, parsed where TRL is imported
            return _train(words[1:])
        if words[:1] == ["serve"]:  # all flags of `vllm serve` are its own, too
            return _serve(words[1:])
        options = _parser(words).parse_args(words)
        report = options.command(options)
        if report is not None and getattr(options, "json", None):
            _write_json(report, options.json)
        sys.stdout.flush()
        return 0
    except IcarusError as error:
        if debug:
            raise
        print(f"icarus: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            raise
        print(f"icarus: {type(error).__name__}: {error} (run with --debug for the traceback)", file=sys.stderr)
        return 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help tells more.")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="icarus", description="Many specialists, one KV cache (arXiv 2603.13281).")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, help: str, *, json: bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(command=command)
        if json:
            sub.add_argument("--json", metavar="FILE", help="write the figures as JSON; - prints them as the last line")
        return sub

    demo = add("demo", _demo, "three specialists take turns in one context, beside the conventional way", json=True)
    demo.add_argument("--threads", type=_count, help="CPU threads (default: all cores)")
    commands.add_parser("train", help="train one specialist (icarus train --help lists the flags)")
    commands.add_parser("serve", help="vLLM's server for many specialists with one cache (icarus serve --help)")
    for name, command, help in (
        ("generate", _generate, "run a list of turns in one context"),
        ("chat", _chat, "talk to several specialists in one context"),
    ):
        sub = add(name, command, help, json=name == "generate")
        sub.add_argument("--base", default=_PACKAGED, help=f"hub id, folder, or {_PACKAGED} (default)")
        sub.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH", help="a specialist; repeatable")
        sub.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
        if name == "generate":
            sub.add_argument(
                "--turns", required=True, metavar="FILE", help="JSON list of turns; - reads standard input"
            )
    verify = add("verify", _verify, "is this adapter safe to share a cache with; exit status 0 or 1", json=True)
    verify.add_argument("adapter", metavar="ADAPTER")
    verify.add_argument("--base", help="also check that it fits this base model")
    base = add("base", _base, "print the folder of a base model", json=True)
    base.add_argument("name", nargs="?", default=_PACKAGED, metavar="NAME")
    add("specialists", _specialists, "print the shipped specialists, one name=folder a line", json=True)
    _add_bench(commands.add_parser("bench", help="measure, each side beside its peer in one run"), words)
    return parser


def _add_bench(bench: argparse.ArgumentParser, words: Sequence[str]) -> None:
    kinds = bench.add_subparsers(required=True, metavar="WHAT", dest="what")

    def add(name: str, help: str, *, dtype: str, repeats: int) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=help, description=help)
        sub.set_defaults(command=_bench)
        sub.add_argument("--base", default=_PACKAGED)
        sub.add_argument("--dtype", default=dtype, choices=["float32", "bfloat16"])
        sub.add_argument(
            "--repeats", type=_count, default=repeats, help=f"alternations of the sides (default: {repeats})"
        )
        sub.add_argument("--json", metavar="FILE", help="write the figures as JSON; - prints them as the last line")
        return sub

    add("decode", "one decode step beside conventional LoRA's, in process", dtype="float32", repeats=20)
    add("train", "one training step beside conventional LoRA's", dtype="float32", repeats=5)
    micro = add("serve-micro", "vLLM's decode, prefill and a chain of specialists", dtype="bfloat16", repeats=5)
    micro.add_argument(
        "--systems",
        type=lambda text: text.split(","),
        default=["base", "stock", "conventional", "icarus"],
        help="engines to compare (default: base,stock,conventional,icarus)",
    )
    micro.add_argument("--starts", type=_count, default=1, help="starts of all engines, as two differ (default: 1)")
    micro.add_argument("--prompt-tokens", type=_count, default=1000, help="of prefill and chain (default: 1000)")
    micro.add_argument("--steps", type=_count, default=32, help="decode steps of each sample (default: 32)")
    micro.add_argument("--profile", type=Path, metavar="DIR", help="also profile each engine, a text file each")
    help = "workflows of agents on served models, each system beside the others"
    agents = kinds.add_parser("agents", help=help, description=help)
    agents.set_defaults(command=_bench_agents)
    agents.add_argument("--json", metavar="FILE", help="write the report as JSON; - prints it as the last line")
    if "agents" in words:  # its options are many, and declared beside its settings
        from icarus.bench import options

        options.add(agents)


def _write_json(report: dict[str, Any], target: str) -> None:
    text = json.dumps(report, ensure_ascii=False)
    if target == "-":
        print(text, flush=True)
        return
    path = Path(target)
    scratch = path.with_name(path.name + ".tmp")
    try:
        scratch.write_text(text + "\n", encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        raise InputError(f"The report cannot be written to {target} ({error.strerror}); name another file.") from error


def _specialists_of(options: argparse.Namespace) -> Any:
    from icarus.context import Specialists

    named = {}
    for item in options.adapter:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise InputError(f"--adapter {item!r} is not NAME=PATH.")
        if name in named:
            raise InputError(f"--adapter names {name!r} twice; give each specialist a name of its own.")
        named[name] = path
    return Specialists.load(options.base, named, dtype=options.dtype)


# ----------------------------------------------------------------------------------------- commands


def _demo(options: argparse.Namespace) -> dict[str, Any]:
    from icarus import demo

    report: dict[str, Any] = demo.run(threads=options.threads)
    return report


def _train(words: list[str]) -> int:
    try:
        from icarus.train import config, run
    except ImportError as error:
        raise InputError(
            f"Training needs more packages ({error.name}); run: pip install 'icarus-llm[train]'."
        ) from error
    ours = _Parser(prog="icarus train", add_help=False, allow_abbrev=False)
    ours.add_argument("--json")
    options, words = ours.parse_known_args(words)
    report = run.run(*config.parse(words))
    if os.environ.get("RANK", "0") != "0":  # one of torchrun's processes speaks for all
        return 0
    print(f"{report['output']}: {report['steps']} steps in {report['seconds']} s", file=sys.stderr)
    if options.json:
        _write_json(report, options.json)
    return 0


def _serve(words: list[str]) -> int:
    from icarus.vllm.server import serve

    return serve.run(words)


def _generate(options: argparse.Namespace) -> None:
    from icarus import turns

    script = turns.read(options.turns)
    done = turns.play(_specialists_of(options), script)
    lines = []
    for turn in done:
        lines.append(turn)
        print(json.dumps(turn, ensure_ascii=False) if options.json == "-" else turn["text"], flush=True)
    if options.json not in (None, "-"):
        _write_json({"turns": lines}, options.json)
    options.json = None


def _chat(options: argparse.Namespace) -> None:
    from icarus import chat

    chat.run(_specialists_of(options))


def _verify(options: argparse.Namespace) -> dict[str, Any]:
    from icarus import adapter, base_model

    if not Path(options.adapter).is_dir():
        raise InputError(f"There is no folder {options.adapter}; give the directory of an adapter.")
    base = base_model.folder(options.base) if options.base else None
    found = adapter.problems(options.adapter, base)
    for problem in found:
        print(f"{options.adapter}: {problem}")
    report: dict[str, Any] = {"adapter": options.adapter, "sound": not found, "problems": found}
    if found:
        if options.json:
            _write_json(report, options.json)
        raise CheckFailed(f"{options.adapter} must not share a KV cache ({len(found)} problem(s) above).")
    info = adapter.verify(options.adapter, base)
    print(f"{options.adapter}: sound; rank {info.rank} on {', '.join(info.targets)}, {info.bytes / 1e6:.1f} MB")
    print(f"base model {info.base_model}, fingerprint {info.base_fingerprint[:16]}")
    if base is None:
        print("not checked against its base model; give --base to do so")
    return {**report, "rank": info.rank, "targets": list(info.targets), "base_fingerprint": info.base_fingerprint}


def _base(options: argparse.Namespace) -> dict[str, Any]:
    from icarus import base_model

    folder = base_model.folder(options.name)
    print(folder)
    return {"name": options.name, "folder": str(folder)}


def _specialists(options: argparse.Namespace) -> dict[str, Any]:
    from icarus import shipped_specialists

    for name, folder in shipped_specialists.shipped().items():
        print(f"{name}={folder}")
    return {name: str(folder) for name, folder in shipped_specialists.shipped().items()}


def _bench(options: argparse.Namespace) -> dict[str, Any]:
    if options.what == "decode":
        from icarus.bench import decode

        return decode.run(options.base, options.dtype, options.repeats)
    if options.what == "train":
        from icarus.bench import train as training

        return training.run(options.base, options.dtype, options.repeats)
    from icarus.bench import serve_micro

    return serve_micro.run(
        options.base,
        options.dtype,
        options.repeats,
        starts=options.starts,
        systems=options.systems,
        prompt=options.prompt_tokens,
        steps=options.steps,
        profile=options.profile,
    )


def _bench_agents(options: argparse.Namespace) -> dict[str, Any]:
    from icarus.bench import agents
    from icarus.bench import options as given

    output = given.output(options)
    return agents.redraw(output) if options.redraw else agents.run(given.settings(options), output)


if __name__ == "__main__":
    sys.exit(main())
