"""What the parsers of the commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from icarus import arguments, cli
from icarus.cli import Command
from icarus.errors import InputError


def parser(**options: Any) -> arguments.Parser:
    result = arguments.Parser(prog="icarus run", **options)
    result.add_argument("--rank", type=arguments.positive_int)
    result.add_argument("--adapters", nargs="+", action=arguments.NamedPaths, default={})
    return result


@pytest.mark.parametrize("word", ["0", "-1", "1.5", "two", "", "²"])
def test_a_count_is_a_positive_integer(word: str) -> None:
    with pytest.raises(InputError, match=f"--rank: must be a positive integer, not '{word}'; see icarus run --help"):
        parser().parse_args([f"--rank={word}"])
    assert parser().parse_args(["--rank", "12"]).rank == 12


def test_named_paths() -> None:
    words = ["--adapters", "a=x", "b=y=z", "--adapters", "c=w"]
    assert parser().parse_args(words).adapters == {"a": "x", "b": "y=z", "c": "w"}
    assert parser().parse_args([]).adapters == {}, "the default is not the first command's"


@pytest.mark.parametrize("word", ["a", "a=", "=x", ""])
def test_what_is_not_a_named_path(word: str) -> None:
    with pytest.raises(InputError, match=f"--adapters: '{word}' is not NAME=PATH"):
        parser().parse_args(["--adapters", word])


def test_a_name_is_given_once() -> None:
    with pytest.raises(InputError, match="'a' is given twice"):
        parser().parse_args(["--adapters", "a=x", "a=y"])


def test_unknown_words_are_an_error_or_left_as_they_are() -> None:
    words = ["--rank", "3", "--a.b", "0", "-x", "--ra=1", '{"a": "b c"}', "--a_b=c d"]
    with pytest.raises(InputError, match=r"unrecognized arguments: --a\.b 0"):
        parser(allow_abbrev=False).parse_args(words)
    passing = parser()
    passing.pass_on()
    options = passing.parse_args(words)
    assert (options.rank, options.rest) == (3, words[2:])
    assert options.words == words


def test_the_other_programs_help(capsys: pytest.CaptureFixture[str]) -> None:
    passing = parser()
    passing.pass_on(help=lambda: "usage: other\n")
    with pytest.raises(SystemExit):
        passing.parse_args(["--help"])
    assert capsys.readouterr().out == "usage: other\n"


def test_a_report_is_a_line_or_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments.write_json({"ä": 1}, "-")
    assert capsys.readouterr().out == '{"ä": 1}\n'
    arguments.write_json({"ä": 1}, str(tmp_path / "report.json"))
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == '{\n "ä": 1\n}\n'


# ------------------------------------------------------------------------------------------- the table of commands


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> list[argparse.Namespace]:
    """A command ``probe`` that passes on what it does not know, and its calls."""
    calls: list[argparse.Namespace] = []

    class Module:
        @staticmethod
        def add_arguments(parser: arguments.Parser) -> None:
            parser.pass_on()

        run = staticmethod(calls.append)

    monkeypatch.setitem(cli.COMMANDS, "probe", Command("", "probed"))
    monkeypatch.setattr(cli, "import_module", lambda name: {"probed": Module}[name])
    return calls


@pytest.mark.parametrize(
    ("words", "debug"),
    [
        (["probe", "--port", "1"], False),
        (["--debug", "probe", "--port", "1"], True),
        (["probe", "--debug", "--port", "1"], True),
        (["probe", "--port", "1", "--debug"], True),
    ],
)
def test_debug_is_taken_before_and_behind_the_command(
    words: list[str], debug: bool, probe: list[argparse.Namespace]
) -> None:
    assert cli.main(words) == 0
    assert (probe[0].debug, probe[0].rest) == (debug, ["--port", "1"])


def test_a_missing_package_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "probe", Command("", "no_such_package", extra="train"))
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == (
        "icarus: icarus probe needs more packages (no_such_package); run: pip install 'icarus-llm[train]'.\n"
    )


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_train_shows_the_flags_of_its_settings(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", word])
    out = capsys.readouterr().out
    for flag in ("--eval_data", "--per_device_train_batch_size", "--json FILE", "--debug"):
        assert flag in out
    for refused in ("--push_to_hub ", "--resume_from_checkpoint", "--dataset_text_field", "--model_init_kwargs"):
        assert refused not in out
