"""``icarus serve`` up to the start of vLLM: bad input, a port that is taken, and what it prints."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from pathlib import Path

import pytest

from icarus import cli
from icarus.errors import InputError
from icarus.vllm.server import serve
from icarus.vllm.server.plan import Plan, Served
from saved import save_adapter, save_base
from strict_skips import needs_vllm


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    save_base(folder / "base")
    save_adapter(folder / "sql")
    return folder


BAD = {
    (): "required: BASE",
    ("--port", "8000", "{base}"): "BASE comes before --port",
    ("--adapter-dir", "{home}", "--port=8000", "{base}"): "BASE comes before --port",
    ("./nowhere",): "nowhere",
    ("{base}", "--adapters", "sql"): "'sql' is not NAME=PATH",
    ("{base}", "--adapters", "a={home}/sql", "a={home}/sql"): "'a' is given twice",
    ("{base}", "--adapters", "a={home}/nowhere"): "nowhere: there is no such directory",
    ("{base}", "--adapters", "a={base}"): "base: adapter_config.json is missing",
    ("{base}", "--adapters", "{base}={home}/sql"): "has the name of the base model",
    ("{base}", "--adapters", "a={home}/sql", "--served-model-name", "b", "a"): "'a' has the name of the base model",
    ("{base}", "--adapters", "a={home}/sql", "--max-lora-rank", "1"): "'a' has rank 4 and --max-lora-rank is 1",
    ("{base}", "--adapters", "a={home}/sql", "--no-enable-lora"): "--no-enable-lora turns off",
    ("{base}", "--read-kv-once", "--no-enable-lora"): "--read-kv-once needs LoRA",
    ("{base}", "--adapter-dir", "{home}", "--no-enable-lora"): "--adapter-dir needs LoRA",
    ("{base}", "--allow-adapters-from", "{home}", "--no-enable-lora"): "--allow-adapters-from needs LoRA",
    ("{base}", "--allow-adapters-from", "{home}", "-asc", "2"): "--allow-adapters-from needs one API server",
    ("{base}", "--port", "http"): "--port 'http' must be an integer",
    ("{base}", "--lora-modules", "a=b"): "--adapters NAME=PATH",
    ("{base}", "--adapter-dir", "{home}/nowhere"): "nowhere is not a folder",
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


def test_folders_are_not_allowed_to_clients_who_may_not_load(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "_need_vllm", lambda: None)
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0")
    assert cli.main(["serve", str(home / "base"), "--allow-adapters-from", str(home)]) == 2
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING turns loading off" in capsys.readouterr().err


def test_without_vllm_the_remedy_is_said(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("vllm", "vllm.entrypoints"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["serve", str(home / "base")]) == 2
    assert "pip install 'icarus-llm[cpu]'" in capsys.readouterr().err


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(InputError, match="--port"):
            serve._check_port(["--host", "127.0.0.1", "--port", port])
        serve._check_port(["--uds", "somewhere", "--port", port])
        (tmp_path / "flags.yaml").write_text(f"host: 127.0.0.1\nport: {port}\n")
        with pytest.raises(InputError, match="--port"):
            serve._check_port(["--config", str(tmp_path / "flags.yaml")])


@needs_vllm
@pytest.mark.parametrize("asked", [["--port", "0"], ["--port=0", "--host", "127.0.0.1"], ["--config", "flags.yaml"]])
def test_a_port_that_the_user_leaves_open_is_said(
    asked: list[str],
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """vLLM says port 0 in its log, and never the one that it got."""
    started: list[list[str]] = []
    monkeypatch.setattr(serve, "_start_vllm", started.append)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.chdir(tmp_path)
    Path("flags.yaml").write_text("port: 0\n")
    assert cli.main(["serve", str(home / "base"), *asked]) == 0
    port = started[0][-1]
    assert started[0][-2] == "--port"
    assert int(port) > 1023
    assert f":{port}/health`" in capsys.readouterr().out


def test_no_port_is_chosen_where_none_is_asked_for() -> None:
    assert serve._chosen_port([]) == serve._chosen_port(["--port", "8000"]) == []
    assert serve._chosen_port(["--port", "0", "--uds", "somewhere"]) == []
    assert serve._chosen_port(["--port", "0", "--host", "no.such.host.invalid"]) == []


ADAPTERS = (Served("sql", Path("/a/sql"), 8, "0123456789abcdef"), Served("plain", Path("/a/plain"), 16, ""))


def said(words: list[str], adapters: tuple[Served, ...] = ADAPTERS, names: tuple[str, ...] = ("smollm",)) -> str:
    return serve.announcement(Plan("smollm", names, "/models/smollm", adapters, Path("/b"), [], {}), words)


def test_the_announcement() -> None:
    lines = said(["--port", "9000"])
    assert "smollm (fingerprint 0123456789ab) writes the KV cache" in lines
    assert "sql    shares it     ICaRus adapter of this base model, rank 8" in lines
    assert "plain  its own cache conventional adapter (no ICaRus marker), rank 16" in lines
    assert "adapters in /b come and go" in lines
    assert "http://localhost:9000/metrics" in lines
    assert '"model": "sql"' in lines


def test_no_word_of_it_means_that_the_server_is_ready() -> None:
    """Scripts wait for what vLLM, uvicorn and others log then."""
    for words in ("startup complete", "Uvicorn running", "Started server"):
        assert words not in said([])


def test_the_announcement_of_a_base_model_alone() -> None:
    lines = said(["--host", "10.0.0.1"], (), ("name", "other"))
    assert lines.startswith("smollm writes the KV cache\n")
    assert "metrics  http://10.0.0.1:8000/metrics" in lines
    assert '"model": "name"' in lines


def test_the_announcement_goes_by_vllms_file_of_flags(tmp_path: Path) -> None:
    (tmp_path / "flags.yaml").write_text("host: '::1'\nport: 9001\nssl-certfile: cert.pem\n")
    config = ["--config", str(tmp_path / "flags.yaml")]
    assert "metrics  https://[::1]:9001/metrics" in said(config)
    assert "metrics  https://[::1]:9002/metrics" in said([*config, "--port", "9002"])


def test_what_to_type_is_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "curl --unix-socket '/tmp/a b' http://localhost/health" in said(["--uds", "/tmp/a b"])
    assert "Authorization" not in said([])
    keyed = said(["--api-key", "secret"])
    assert '-H "Authorization: Bearer $VLLM_API_KEY"' in keyed
    assert "secret" not in keyed
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert '-H "Authorization: Bearer $VLLM_API_KEY"' in said([])
    odd = Served("it's", Path("/a"), 8, "")
    curl = said([], (odd,)).splitlines()[-1].removeprefix("ask      ")
    assert json.loads(shlex.split(curl)[-1])["model"] == "it's"
    assert "curl" not in said(["--headless"])


def test_the_base_models_name_may_stand_in_vllms_file_of_flags(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "_need_vllm", lambda: None)
    (tmp_path / "flags.yaml").write_text("served-model-name: [small, smaller]\n")
    words = [str(home / "base"), "--adapters", f"smaller={home}/sql", "--config", str(tmp_path / "flags.yaml")]
    assert cli.main(["serve", *words]) == 2
    assert "'smaller' has the name of the base model" in capsys.readouterr().err


@needs_vllm
@pytest.mark.parametrize("name", ["text", "video", "input_audio"])
def test_a_name_that_vllm_gives_a_meaning_is_refused_before_the_engine_starts(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "_start_vllm", lambda words: pytest.fail("the engine starts"))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert cli.main(["serve", str(home / "base"), "--adapters", f"{name}={home}/sql", "--port", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cannot be named {name!r}" in line
