"""The command: what it prints, its exit status, and what it says when it is used wrongly."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from icarus import Specialists, adapter, chat, cli, shipped_specialists, turns
from icarus.errors import InputError
from saved import save_adapter, save_base, save_rows

KEYS = {"model", "text", "token_ids", "finish_reason", "encoded_tokens", "cached_tokens", "kv_bytes", "seconds"}
TURNS = [
    {"append": "abc", "model": "one", "max_new_tokens": 3},
    {"model": "two", "max_new_tokens": 2},
    {
        "messages": [{"role": "user", "content": "hi"}],
        "model": "base",
        "max_new_tokens": 2,
        "temperature": 1,
        "seed": 4,
    },
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model and two adapters."""
    folder = tmp_path_factory.mktemp("home")
    save_base(folder / "base")
    save_adapter(folder / "one", seed=1)
    save_adapter(folder / "two", seed=2)
    (folder / "turns.json").write_text(json.dumps(TURNS))
    save_rows(folder / "data.jsonl", {"prompt": "a", "completion": "b"})
    return folder


@pytest.fixture(autouse=True)
def _there(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(home)
    monkeypatch.setenv("TQDM_DISABLE", "1")  # what ``main`` sets, put back afterwards
    before = sorted(home.rglob("*"))
    yield
    assert sorted(home.rglob("*")) == before, "a command left files behind"


BASE = ["--base", "base"]
TEAM = [*BASE, "--adapter", "one=one", "--adapter", "two=two"]
GENERATE = ["generate", "--turns", "turns.json"]
Capture = pytest.CaptureFixture[str]


def run(*words: str, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=timeout, check=False, **options
    )


def sentence(err: str) -> str:
    (line,) = err.splitlines()
    assert line.startswith("icarus: ")
    assert line.endswith((".", ")"))
    return line


# ----------------------------------------------------------------------------------------- bad input

BAD = {
    (): "COMMAND",
    ("nonsense",): "nonsense",
    ("--nonsense",): "--nonsense|COMMAND",
    ("generate",): "--turns",
    ("generate", "--turns", "none.json"): "none.json .*No such file",
    ("generate", "--turns", "data.jsonl", "--base", "nowhere"): "data.jsonl must hold a non-empty JSON list",
    ("generate", "--turns", "base/model.safetensors"): "base/model.safetensors is not JSON",
    (*GENERATE, "--base", "./nowhere"): "./nowhere",
    (*GENERATE, "--base", "owner/nowhere"): "owner/nowhere",
    (*GENERATE, "--base", "one"): "one.*config.json",
    (*GENERATE, "--dtype", "int3"): "int3",
    (*GENERATE, *BASE, "--adapter", "one"): "'one' is not NAME=PATH",
    (*GENERATE, *BASE, "--adapter", "a=one", "--adapter", "a=two"): "'a' is given twice",
    (*GENERATE, *BASE, "--adapter", "a=./nowhere"): "nowhere",
    (*GENERATE, *BASE, "--adapter", "base=one"): "'base'",
    (*GENERATE, *BASE): "'(one|two)'; there are base",
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
    ("train", "--base", "base", "--data", "data.jsonl", "--output", "o", "--targets", "v_proj"): "v_proj",
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


@pytest.mark.parametrize("base", [[], BASE], ids=["alone", "with base"])
def test_verify_sound(base: list[str], capsys: Capture) -> None:
    assert cli.main(["verify", "one", *base, "--json", "-"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("one: sound; rank 4 on down_proj, gate_proj")
    assert any("give --base" in line for line in out) == (not base)
    report = json.loads(out[-1])
    assert report == {
        "adapter": "one",
        "sound": True,
        "problems": [],
        "rank": 4,
        "targets": ["down_proj", "gate_proj", "o_proj", "q_proj", "up_proj"],
        "base_fingerprint": adapter.verify("one").base_fingerprint,
    }


def test_verify_an_adapter_of_another_base_model(tmp_path: Path, capsys: Capture) -> None:
    words = ["verify", str(save_adapter(tmp_path / "bad")), "--json", str(tmp_path / "report.json")]
    assert cli.main([*words, "--base", str(save_base(tmp_path / "other", seed=5))]) == 1
    out, err = capsys.readouterr()
    assert "must not share a KV cache, for the reason above" in sentence(err)
    report = json.loads((tmp_path / "report.json").read_text())
    (problem,) = report["problems"]
    assert out == f"{tmp_path / 'bad'}: {problem}\n"
    assert "another base model" in problem
    assert report["sound"] is False


def without_marker(folder: Path, **fields: Any) -> Path:
    """A plain LoRA."""
    config = save_adapter(folder) / "adapter_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "icarus"} | fields))
    return folder


@pytest.mark.parametrize("base", [[], BASE], ids=["alone", "with base"])
def test_verify_says_what_a_conventional_adapter_is(base: list[str], tmp_path: Path, capsys: Capture) -> None:
    words = ["verify", str(without_marker(tmp_path / "plain")), *base, "--json", str(tmp_path / "report.json")]
    assert cli.main(words) == 1
    out, err = capsys.readouterr()
    assert "must not share a KV cache, for the reason above" in sentence(err)
    reason, kind, *more = out.splitlines()
    assert "no ICaRus marker" in reason
    assert "a conventional adapter, rank 4 on down_proj" in kind
    assert "it can be served, with a cache of its own" in kind
    assert more == ([] if base else ["not checked against its base model; give --base to do so"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["sound"], report["kind"], report["served"], report["rank"]) == (False, "conventional", True, 4)


def test_verify_says_why_a_conventional_adapter_cannot_be_served(tmp_path: Path, capsys: Capture) -> None:
    plain = without_marker(tmp_path / "plain", use_dora=True, lora_alpha=None)
    assert cli.main(["verify", str(plain), "--json", "-"]) == 1
    reason, kind, *problems, report = capsys.readouterr().out.splitlines()
    assert "no ICaRus marker" in reason
    assert kind.endswith("a conventional adapter, which cannot be served either:")
    assert [word in problem for word, problem in zip(("use_dora", "lora_alpha"), problems, strict=True)] == [True] * 2
    assert json.loads(report)["served"] is False


def test_train(tmp_path: Path, capsys: Capture) -> None:
    words = ["train", *BASE, "--data", "data.jsonl", "--output", str(tmp_path / "out"), "--max_steps", "1"]
    words += ["--use_cpu", "--save_strategy", "no", "--json", str(tmp_path / "report.json")]
    assert cli.main(words) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["steps"], report["output"]) == (1, str(tmp_path / "out"))
    assert cli.main(["verify", str(tmp_path / "out"), *BASE]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out'}: sound")


# --------------------------------------------------------------------------------------------- generate


def test_generate_prints_one_object_a_turn(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main([*GENERATE, *TEAM, "--json", "-"]) == 0
    done = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [turn.keys() for turn in done] == [KEYS] * 3
    assert [turn["model"] for turn in done] == ["one", "two", "base"]
    first, second, third = done
    assert (first["encoded_tokens"], first["cached_tokens"]) == (3 + len(first["token_ids"]) - 1, 0)
    assert second["cached_tokens"] == first["encoded_tokens"]  # the cache that the other one left
    assert len(second["token_ids"]) <= 2
    assert third["kv_bytes"] > second["kv_bytes"] > first["kv_bytes"] > 0

    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(TURNS)))
    assert cli.main(["generate", "--turns", "-", *TEAM]) == 0
    assert capsys.readouterr().out == "".join(turn["text"] + "\n" for turn in done)


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
    assert [turn.keys() for turn in json.loads(report.read_text())["turns"]] == [KEYS] * 3
    assert list(tmp_path.iterdir()) == [report]


@pytest.mark.parametrize(
    ("script", "what"),
    [
        ({}, "non-empty JSON list"),
        ([], "non-empty JSON list"),
        (["a"], "turn 1 of .* is not a JSON object"),
        ([{}, {"modle": "one"}], "turn 2 of .* unknown key 'modle'; known are model, append"),
        ([{"append": 5}], "turn 1.*'append' must be str, not 5"),
        ([{"append": "a", "messages": []}], "turn 1.*both"),
        ([{"max_new_tokens": True}], "'max_new_tokens' must be int"),
        ([{"max_new_tokens": "9"}], "'max_new_tokens' must be int"),
        ([{"temperature": [1]}], "'temperature' must be int or float"),
        ([{"stop": ["a", 5]}], "'stop' must be"),
    ],
)
def test_bad_turns_are_refused_before_anything_is_loaded(script: Any, what: str, tmp_path: Path) -> None:
    (tmp_path / "turns.json").write_text(json.dumps(script))
    with pytest.raises(InputError, match=what):
        turns.read(str(tmp_path / "turns.json"))


@pytest.fixture(scope="module")
def team(home: Path) -> Specialists:
    return Specialists.load(str(home / "base"), {name: home / name for name in ("one", "two")})


def test_an_unknown_model_is_named_before_anything_runs(team: Specialists, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "context", lambda: pytest.fail("something ran"))
    with pytest.raises(InputError, match="'three'; there are base, one, two"):
        next(turns.play(team, [{"append": "a", "model": "one"}, {"model": "three"}]))


# ----------------------------------------------------------------------------------------------- chat


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
