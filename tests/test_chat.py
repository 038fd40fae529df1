"""``icarus chat``: who speaks, and the commands between."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

from home import TEAM, Capture, run
from icarus import Specialists, chat

pytestmark = pytest.mark.usefixtures("at_home")


@pytest.fixture
def talk(team: Specialists, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Any:
    """Type lines; returns the prompts, and what was printed behind each."""

    def run_chat(*lines: Any) -> tuple[list[str], list[str]]:
        waiting, prompts, shown = list(lines), list[str](), list[str]()

        def read(prompt: str) -> str:
            prompts.append(prompt)
            shown.append(capsys.readouterr().out)
            if not waiting:
                raise EOFError
            line = waiting.pop(0)
            if isinstance(line, BaseException):
                raise line
            return str(line)

        monkeypatch.setattr("builtins.input", read)
        chat.talk(team)
        return prompts, [*shown, capsys.readouterr().out]

    return run_chat


FIGURES = re.compile(r"(\w+): (\d+) tokens encoded, (\d+) cached, [\d.]+ MB KV, [\d.]+ s\n$")


def test_specialists_take_turns_in_one_chat(talk: Any) -> None:
    prompts, shown = talk("/max 3", "@one hi", "more", "@two", "@base and you", "/quit", "never read")
    assert prompts == ["[base] > ", "[base] > ", "[one] > ", "[one] > ", "[two] > ", "[base] > "]
    assert shown[0].startswith("Specialists: base, one, two. Commands: ")
    figures = [FIGURES.search(text) for text in shown[2:6]]
    assert [match and match[1] for match in figures] == ["one", "one", "two", "base"]
    encoded, cached = ([int(match[i]) for match in figures if match] for i in (2, 3))
    assert cached == [sum(encoded[:i]) for i in range(4)]
    assert encoded[2] <= 3  # went on where the other stopped, with nothing to encode anew


def test_undo_takes_back_the_last_exchange(talk: Any) -> None:
    lines = ["@one hi", "/text", "@two ho", "/text", "/undo", "/text", "/undo", "/undo", "/text"]
    shown = talk("/max 2", *lines)[1][2:-1]
    once, twice, undone, nothing = (text for line, text in zip(lines, shown, strict=True) if line == "/text")
    assert twice.startswith(once[:-1])
    assert len(twice) > len(once)
    assert (undone, nothing) == (once, "\n")


def test_max_limits_an_answer(talk: Any) -> None:
    lengths = []
    for limit in (1, 4):
        *_, answer, _ = talk(f"/max {limit}", "@one hi")[1]
        lengths.append(len(answer.split("\n    ")[0]))
    assert lengths[0] <= 1 < lengths[1] <= 4


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/max none", "/max none.*for example /max 64"),
        ("/max 0", "/max 0"),
        ("/max", "/max"),
        ("/max ²", "/max ².*one positive integer"),
        ("/max 3 4", "one positive integer"),
        ("/what", "Commands: @NAME"),
        ("@nobody hi", "'nobody'; there are base, one, two"),
        ("@one", "The context is empty"),
        ("", "^$"),
    ],
)
def test_a_bad_command_is_answered_and_the_chat_goes_on(line: str, answer: str, talk: Any) -> None:
    prompts, shown = talk("/max 1", line, "@two hi")
    assert re.search(answer, shown[2])
    assert FIGURES.search(shown[3])
    assert prompts[-1] == "[two] > "


@pytest.mark.parametrize("end", [EOFError(), KeyboardInterrupt()])
def test_end_of_input_and_interrupt_end_the_chat(end: BaseException, talk: Any) -> None:
    prompts, _ = talk(end, "never read")
    assert len(prompts) == 1


def test_chat_from_a_pipe() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"} | {"OMP_NUM_THREADS": "1"}
    done = run("-m", "icarus.cli", "chat", *TEAM, input="/max 2\n@one hi\n@two\n", env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"(\w+): \d+ tokens encoded", done.stdout) == ["one", "two"]
