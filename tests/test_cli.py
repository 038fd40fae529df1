"""The command: what it prints, its exit status, and what it says when it is used wrongly."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from home import BASE, GENERATE, TEAM, Capture, run, sentence
from icarus import cli, shipped_specialists, turns
from icarus.errors import InputError

pytestmark = pytest.mark.usefixtures("at_home")


# ----------------------------------------------------------------------------------------- bad input

BAD = {
    (): "COMMAND",
    ("nonsense",): "nonsense",
    ("--nonsense",): "--nonsense|COMMAND",
    ("generate",): "--turns",
    ("generate", "--turns", "none.json"): "none.json .*No such file",
    ("generate", "--turns", "data.jsonl", "--base", "nowhere"): "data.jsonl must hold a non-empty JSON list",
    ("generate", "--turns", "base/model.safetensors"): "base/model.safetensors is not JSON",
    (*GENERATE, *TEAM, "--base", "./nowhere"): "./nowhere",
    (*GENERATE, *TEAM, "--base", "owner/nowhere"): "owner/nowhere",
    (*GENERATE, *TEAM, "--base", "one"): "one.*config.json",
    (*GENERATE, "--dtype", "int3"): "int3",
    (*GENERATE, *BASE, "--adapter", "one"): "'one' is not NAME=PATH",
    (*GENERATE, *BASE, "--adapter", "a=one", "--adapter", "a=two"): "'a' is given twice",
    (*GENERATE, *TEAM, "--adapter", "a=./nowhere"): "nowhere",
    (*GENERATE, *TEAM, "--adapter", "base=one"): "'base'",
    (*GENERATE, *BASE): "the specialist 'one'; load it with --adapter one=PATH",
    (*GENERATE, *TEAM, "--json", "none/report.json"): "none/report.json",
    ("chat", "--base", "./nowhere"): "./nowhere",
    ("verify",): "ADAPTER",
    ("verify", "one", "--base", "./nowhere"): "./nowhere",
    ("verify", "one", "--json", "none/report.json"): "none/report.json",
    ("base", "./nowhere"): "./nowhere",
    ("base", "owner/nowhere"): "owner/nowhere",
    ("base", "a", "b"): "b",
    ("specialists", "a"): "a",
    ("demo", "--threads", "0"): "--threads.*'0'",
    ("bench",): "WHAT",
    ("bench", "nothing"): "nothing",
    ("bench", "decode", "--base", "./nowhere"): "./nowhere",
    ("bench", "train", "--base", "./nowhere"): "./nowhere",
    ("bench", "decode", "--repeats", "-1"): "--repeats.*'-1'",
    ("train",): "--base, --data, --output",
    ("train", "--base", "base", "--data", "none.jsonl", "--output", "o"): "none.jsonl",
    ("train", "--base", "./nowhere", "--data", "data.jsonl", "--output", "o"): "./nowhere",
    ("train", "--json"): "expected one argument",
    ("train", "--config", "none.yaml"): "none.yaml",
    (*"train --base base --data data.jsonl --output o --dtype float32 --targets v_proj".split(),): "v_proj",
}


@pytest.mark.parametrize("words", BAD, ids=" ".join)
def test_bad_input_is_one_sentence_and_status_2(words: tuple[str, ...], capsys: Capture) -> None:
    assert cli.main(words) == 2
    assert re.search(BAD[words], sentence(capsys.readouterr().err))


def test_debug_shows_the_traceback(capsys: Capture) -> None:
    with pytest.raises(InputError, match="nowhere"):
        cli.main(["base", "./nowhere", "--debug"])
    done = run("-m", "icarus.cli", "--debug", "base", "./nowhere")
    assert "Traceback" in done.stderr
    assert "Traceback" not in run("-m", "icarus.cli", "base", "./nowhere").stderr


def test_an_unexpected_error_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(turns, "read", lambda source: 1 / 0)
    assert cli.main(GENERATE) == 1
    assert "ZeroDivisionError: division by zero (icarus --debug ... shows" in sentence(capsys.readouterr().err)
    with pytest.raises(ZeroDivisionError):
        cli.main([*GENERATE, "--debug"])


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupted(source: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(turns, "read", interrupted)
    assert cli.main(GENERATE) == 130
    assert capsys.readouterr() == ("", "")


def test_a_closed_pipe_is_silent() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "icarus.cli", "base", "base"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment, timeout=300, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


# -------------------------------------------------------------------------------------------- small commands


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_that_wait_give_way_unless_the_user_says_how_they_wait(
    given: dict[str, str], wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["specialists"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == wanted


def test_neither_import_nor_help_loads_torch() -> None:
    code = """if True:
        import sys, icarus
        from icarus import cli
        try:
            cli.main(["--help"])
        except SystemExit as end:
            assert end.code == 0
        print({"torch", "transformers", "peft", "trl", "datasets", "vllm"} & set(sys.modules), end="")
    """
    done = run("-c", code)
    assert done.stdout.startswith("usage: icarus")
    assert done.stdout.endswith("set()"), done.stdout[-200:] + done.stderr
    assert set(re.findall(r"^    (\w+) ", done.stdout, re.M)) >= {
        "demo",
        "train",
        "serve",
        "generate",
        "chat",
        "verify",
        "base",
    }


def test_base_prints_the_folder(capsys: Capture) -> None:
    assert cli.main(["base", "base"]) == 0
    assert capsys.readouterr() == ("base\n", "")


def test_specialists_are_printed_as_arguments_for_adapter(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    (tmp_path / "figures.json").write_text(json.dumps({"sql": {}, "poet": {}}))
    monkeypatch.setattr(shipped_specialists, "_SHIPPED", tmp_path)
    assert cli.main(["specialists"]) == 0
    assert capsys.readouterr().out == f"sql={tmp_path / 'sql'}\npoet={tmp_path / 'poet'}\n"


def test_train(tmp_path: Path, capsys: Capture) -> None:
    words = ["train", *BASE, "--data", "data.jsonl", "--output", str(tmp_path / "out"), "--max_steps", "1"]
    words += ["--use_cpu", "--save_strategy", "no", "--json", str(tmp_path / "report.json")]
    assert cli.main(words) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["steps"], report["output"]) == (1, str(tmp_path / "out"))
    assert cli.main(["verify", str(tmp_path / "out"), *BASE]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out'}: sound")


def test_the_report_replaces_its_file_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    report = tmp_path / "report.json"
    report.write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert cli.main([*GENERATE, *TEAM, "--json", str(report)]) == 2
    assert report.read_text() == "old"
    assert list(tmp_path.iterdir()) == [report]
    assert "No space left" in sentence(capsys.readouterr().err)
    assert cli.main([*GENERATE, *TEAM, "--json", str(report)]) == 0
    assert [turn["model"] for turn in json.loads(report.read_text())["turns"]] == ["one", "two", "base"]
    assert list(tmp_path.iterdir()) == [report]
