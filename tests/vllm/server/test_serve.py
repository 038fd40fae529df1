"""``icarus serve`` up to the start of vLLM: bad input, a port that is taken, and what it prints. Needs no vLLM."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from icarus import cli
from icarus.errors import InputError
from icarus.vllm.server import serve
from icarus.vllm.server.plan import Plan, Served
from saved import save_adapter, save_base


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


def test_without_vllm_the_remedy_is_said(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("vllm", "vllm.entrypoints"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["serve", str(home / "base")]) == 2
    assert "pip install 'icarus-llm[cpu]'" in capsys.readouterr().err


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(InputError, match="--port"):
            serve._check_port(["--host", "127.0.0.1", "--port", port])
        serve._check_port(["--uds", "somewhere", "--port", port])


def test_the_announcement() -> None:
    adapters = (Served("sql", Path("/a/sql"), 8, "0123456789abcdef"), Served("plain", Path("/a/plain"), 16, ""))
    said = serve.announcement(Plan("smollm", "/models/smollm", adapters, Path("/b"), [], {}), ["--port", "9000"])
    assert "smollm (fingerprint 0123456789ab) writes the KV cache" in said
    assert "sql    shares it     ICaRus adapter of this base model, rank 8" in said
    assert "plain  its own cache conventional adapter (no ICaRus marker), rank 16" in said
    assert "adapters in /b come and go" in said
    assert "http://localhost:9000/metrics" in said
    assert '"model": "sql"' in said


def test_the_announcement_of_a_base_model_alone() -> None:
    said = serve.announcement(Plan("smollm", "/models/smollm", (), None, [], {}), ["--host", "10.0.0.1"])
    assert said.startswith("smollm writes the KV cache\nmetrics  http://10.0.0.1:8000/metrics")
    assert '"model": "smollm"' in said
