"""``icarus serve`` without a server: what vLLM is called with, what may be loaded, and how a folder is followed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

from conftest import tiny
from icarus import adapter, cli
from icarus.arguments import Parser
from icarus.errors import AdapterError, InputError
from icarus.vllm.server import folders, serve, watch
from saved import save_base
from strict_skips import needs_vllm


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    save_base(folder / "base")
    for name in ("team/sql", "team/chat", "plain"):
        adapter.save(adapter.attach(tiny(), rank=4), folder / name)
    plain = folder / "plain"
    config = json.loads((plain / "adapter_config.json").read_text())
    del config["icarus"]
    (plain / "adapter_config.json").write_text(json.dumps(config))
    return folder


def planned(*words: str, **environment: str) -> serve.Plan:
    parser = Parser(prog="icarus serve")
    serve.add_arguments(parser)
    return serve.plan(parser.parse_args(words), environment)


def value(made: serve.Plan, flag: str) -> list[str]:
    """The words that follow a flag, up to the next one; once and not twice."""
    assert made.flags.count(flag) == 1, made.flags
    after = made.flags[made.flags.index(flag) + 1 :]
    end = next((index for index, word in enumerate(after) if word.startswith("--")), len(after))
    return after[:end]


# ------------------------------------------------------------------------------------------------- the command line


def test_adapters_are_lora_modules_and_all_else_is_vllms(home: Path) -> None:
    made = planned(
        *(str(home / "base"), "--adapters", f"sql={home}/team/sql", f"chat={home}/team/chat"),
        *("--port", "8123", "--adapters", f"plain={home}/plain", "--compilation-config.level", "0", "--enforce-eager"),
    )
    assert made.flags[-5:] == ["--port", "8123", "--compilation-config.level", "0", "--enforce-eager"]
    modules = [json.loads(word) for word in value(made, "--lora-modules")]
    assert modules == [
        {"name": name, "path": str(home / path), "base_model_name": str(home / "base")}
        for name, path in (("sql", "team/sql"), ("chat", "team/chat"), ("plain", "plain"))
    ]
    assert [bool(served.base_fingerprint) for served in made.adapters] == [True, True, False]
    assert value(made, "--max-lora-rank") == ["8"]
    assert value(made, "--max-loras") == ["8"]
    assert value(made, "--served-model-name") == [str(home / "base")]
    assert value(made, "--enable-prompt-tokens-details") == value(made, "--enable-lora") == []


@pytest.mark.parametrize("word", ["--max-lora-rank=64", "--max_lora_rank=64"])
def test_what_the_user_says_stands(home: Path, word: str) -> None:
    made = planned(str(home / "base"), word, "--served-model-name", "a", "b", "--no-enable-prompt-tokens-details")
    assert "--max-lora-rank" not in made.flags
    assert value(made, "--served-model-name") == ["a", "b"]
    assert "--enable-prompt-tokens-details" not in made.flags


def test_the_config_file_counts_as_said(home: Path, tmp_path: Path) -> None:
    (tmp_path / "flags.yaml").write_text("max_loras: 3\nserved-model-name: x\n")
    made = planned(str(home / "base"), "--config", str(tmp_path / "flags.yaml"))
    assert not {"--max-loras", "--served-model-name"} & set(made.flags)
    with pytest.raises(InputError, match=r"none\.yaml cannot be read"):
        planned(str(home / "base"), "--config", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(("rank", "least"), [(1, 1), (2, 8), (8, 8), (9, 16), (33, 64), (257, 320), (512, 512)])
def test_the_least_rank_with_room(rank: int, least: int) -> None:
    assert serve.allowed_rank(rank) == least


def test_no_rank_beyond_vllms() -> None:
    with pytest.raises(InputError, match="up to 512"):
        serve.allowed_rank(513)


@needs_vllm
def test_ranks_are_vllms() -> None:
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == serve.LORA_RANKS


def test_environment(home: Path) -> None:
    base, adapters = str(home / "base"), ["--adapters", f"sql={home}/team/sql"]
    made = planned(base, *adapters, "--allow-adapters-from", str(home / "plain"))
    assert made.environment[folders.ALLOWED_VARIABLE].split(os.pathsep) == [str(home / "team"), str(home / "plain")]
    assert made.environment["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert made.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert "VLLM_PLUGINS" not in made.environment, "vLLM loads all plugins then"
    assert planned(base, VLLM_PLUGINS="a").environment["VLLM_PLUGINS"] == "a,icarus"
    assert planned(base, VLLM_PLUGINS="").environment["VLLM_PLUGINS"] == "icarus"
    assert "VLLM_PLUGINS" not in planned(base, VLLM_PLUGINS="icarus,a").environment
    assert planned(base, VLLM_USE_V2_MODEL_RUNNER="1").environment["VLLM_USE_V2_MODEL_RUNNER"] == "1"


def test_data_parallel_engines_have_one_front_end_unless_asked_for_more(home: Path) -> None:
    base = str(home / "base")
    assert value(planned(base, "--data-parallel-size=2"), "--api-server-count") == ["1"]
    assert "--api-server-count" in planned(base, "-dp", "2").flags
    assert "--api-server-count" not in planned(base).flags
    several = planned(base, "--data-parallel-size", "2", "--api-server-count", "2")
    assert several.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "0", "vLLM has both at once in no case"
    with pytest.raises(InputError, match="--api-server-count 1"):
        planned(base, "--api-server-count=2", "--adapter-dir", str(home / "team"))


def test_a_folder_makes_room_for_what_it_holds(home: Path, tmp_path: Path) -> None:
    for number in range(9):
        shutil.copytree(home / "team" / "sql", tmp_path / f"a{number}")
    (tmp_path / "a0" / "adapter_model.safetensors").write_text("no")
    made = planned(str(home / "base"), "--adapter-dir", str(tmp_path), "--max-num-seqs", "4")
    assert value(made, "--max-loras") == ["8"], "the sound ones"
    assert made.environment[watch.WATCHED_VARIABLE] == str(tmp_path)
    assert made.environment[folders.ALLOWED_VARIABLE] == str(tmp_path)


BAD = {
    (): "required: BASE",
    ("--port", "8000", "{base}"): "BASE comes before --port",
    ("--adapter-dir", "{home}/team", "--port=8000", "{base}"): "BASE comes before --port",
    ("./nowhere",): "nowhere",
    ("{base}", "--adapters", "sql"): "'sql' is not NAME=PATH",
    ("{base}", "--adapters", "a={home}/plain", "a={home}/plain"): "'a' is given twice",
    ("{base}", "--adapters", "a={home}/nowhere"): "nowhere is no adapter",
    ("{base}", "--adapters", "a={base}"): "is no adapter",
    ("{base}", "--lora-modules", "a=b"): "--adapters NAME=PATH",
    ("{base}", "--adapter-dir", "{home}/nowhere"): "nowhere is no folder",
}


@pytest.mark.parametrize("words", BAD, ids=" ".join)
def test_bad_input_is_one_sentence(
    words: tuple[str, ...], home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "_need_vllm", lambda: None)
    filled = [word.format(home=home, base=home / "base") for word in words]
    assert cli.main(["serve", *filled]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert BAD[words] in line


def test_an_adapter_of_another_base_model_stops_the_start(home: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", seed=9)
    with pytest.raises(AdapterError, match="trained on another base model"):
        planned(str(other), "--adapters", f"sql={home}/team/sql")


def test_without_vllm_the_remedy_is_said(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("vllm", "vllm.entrypoints"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["serve", str(home / "base")]) == 2
    assert "pip install 'icarus-llm[cpu]'" in capsys.readouterr().err


def test_the_announcement(home: Path) -> None:
    words = ["--adapters", f"sql={home}/team/sql", f"plain={home}/plain", "--port", "9000"]
    made = planned(str(home / "base"), *words)
    said = serve.announcement(made, ["--port", "9000"])
    assert "sql    shares it" in said
    assert "plain  its own cache" in said
    assert "http://localhost:9000/metrics" in said
    assert made.adapters[0].base_fingerprint[:12] in said


def test_a_port_that_is_taken(home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(InputError, match="--port"):
            serve._check_port(["--host", "127.0.0.1", "--port", port])
        serve._check_port(["--uds", "somewhere", "--port", port])
