"""``icarus chat``: talk to several specialists in one context.

``@name text`` addresses a specialist, which answers until another is named; ``@name`` alone lets it continue where the
last one stopped, even in mid-sentence.
"""

from __future__ import annotations

import argparse
import re
import sys

from icarus import team
from icarus.arguments import positive_int
from icarus.context import BASE, Context, Specialists, Turn
from icarus.errors import InputError

_HELP = "Commands: @NAME [text]  /undo  /max N  /text  /quit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``icarus chat``."""
    parser.epilog = _HELP
    team.add_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Load the specialists and talk."""
    talk(team.load(options))


def talk(specialists: Specialists) -> None:
    """Read lines until the end of input; answers stream to standard output."""
    print(f"Specialists: {', '.join(specialists.names)}. {_HELP}")
    context, speaker, limit, starts = specialists.context(), BASE, 256, list[int]()
    while (line := _line(speaker)) is not None:
        try:
            if line == "/quit":
                return
            if line == "/undo":
                context.rollback(starts.pop() if starts else 0)
            elif line == "/text":
                print(context.text)
            elif line.split()[:1] == ["/max"]:
                limit = _limit(line)
            elif line.startswith("/"):
                print(_HELP)
            elif line:
                name, text = _addressed(line, speaker)
                specialists.adapter(name)
                speaker = name
                start = len(context.token_ids)
                if _answer(context, speaker, text, limit):
                    starts.append(start)
                else:
                    context.rollback(start)
        except InputError as error:
            print(error)


def _line(speaker: str) -> str | None:
    try:
        return input(f"[{speaker}] > ").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        print()
        return None


def _addressed(line: str, speaker: str) -> tuple[str, str]:
    match = re.match(r"@(\S+)\s*(.*)", line, re.DOTALL)
    return (match[1], match[2]) if match else (speaker, line)


def _limit(line: str) -> int:
    try:
        (limit,) = map(positive_int, line.split()[1:])
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise InputError(f"{line!r} must have one positive integer, for example /max 64.") from error
    return limit


def _answer(context: Context, speaker: str, text: str, limit: int) -> bool:
    """Returns False if the answer was interrupted or refused."""
    if text:
        context.append([{"role": "user", "content": text}])
    try:
        turn = context.generate(speaker, max_new_tokens=limit, stream=_show)
    except KeyboardInterrupt:
        print("\n    interrupted; question and answer are forgotten")
        return False
    except InputError as error:
        print(error)
        return False
    print(f"\n    {_figures(turn)}")
    return True


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _figures(turn: Turn) -> str:
    return (
        f"{turn.model}: {turn.encoded_tokens} tokens encoded, {turn.cached_tokens} cached, "
        f"{turn.kv_bytes / 1e6:.1f} MB KV, {turn.seconds:.1f} s"
    )
