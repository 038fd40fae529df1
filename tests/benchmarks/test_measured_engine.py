"""The engine that ``benchmarks/serve_micro`` measures answers each kind of command, with and without the plugin."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from strict_skips import WITHOUT_VLLM

pytest.importorskip("vllm.config", reason=WITHOUT_VLLM)

from benchmarks.serve_micro.engine_process import EngineFailed, EngineProcess
from engines import BLOCK, Shop
from tiny_models import tokens

pytestmark = pytest.mark.engine

PROMPT = tokens(BLOCK + 5, seed=1).tolist()
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    "block_size": BLOCK,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,  # so that the prompts of a batch are prefilled in several steps
    "enable_lora": True,
    "max_loras": 3,
    "max_lora_rank": 8,
}


@pytest.fixture(scope="module", params=["", "icarus"], ids=["stock", "plugin"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    folder = tmp_path_factory.mktemp("shop")
    Shop(folder)
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": request.param}
    with EngineProcess(request.param or "stock", folder / "log", environment) as started:
        adapters = {name: str(folder / name) for name in ("sql", "chat")}
        about = started.ask({"engine": {"model": str(folder / "base"), **ENGINE}, "adapters": adapters})
        assert about["plugins"] == request.param
        assert about["threads"] >= 1
        yield started


def asked(*adapters: str | None, seed: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": tokens(40, seed=seed + number).tolist(), "adapter": adapter}
        for number, adapter in enumerate(adapters)
    ]


def test_a_batch_decodes_together(engine: EngineProcess) -> None:
    answer = engine.ask({"do": "decode", "requests": asked("sql", "chat", None, "sql", seed=50), "steps": 5})
    assert len(answer["step_seconds"]) == 5
    assert all(seconds > 0 for seconds in answer["step_seconds"])


def test_turns_tell_what_was_cached(engine: EngineProcess) -> None:
    requests = [{"prompt": PROMPT, "adapter": adapter} for adapter in ("sql", "chat", None)]
    turns = engine.ask({"do": "turns", "requests": requests, "tokens": 3})["turns"]
    shared = 0 if engine.name == "stock" else BLOCK
    assert [turn["cached_tokens"] for turn in turns] == [0, shared, shared]
    assert {(turn["prompt_tokens"], turn["tokens"]) for turn in turns} == {(len(PROMPT), 3)}


@pytest.mark.parametrize(
    "measured",
    [
        {"do": "decode", "requests": asked("sql", "chat", seed=60), "steps": 3},
        {"do": "turns", "requests": asked("sql", seed=70), "tokens": 1},
    ],
    ids=["decode", "turns"],
)
def test_a_profile_names_operators(engine: EngineProcess, measured: dict[str, Any]) -> None:
    table = engine.ask({"do": "profile", "measure": measured, "rows": 20})["table"]
    assert "Self CPU" in table
    assert "aten::" in table


def test_an_error_is_an_answer_and_the_engine_lives(engine: EngineProcess) -> None:
    with pytest.raises(EngineFailed, match=r"no command 'nothing'[\s\S]*Traceback"):
        engine.ask({"do": "nothing"})
    assert engine.ask({"do": "turns", "requests": asked(None, seed=80), "tokens": 1})["turns"]


def test_an_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        EngineProcess("lost", tmp_path / "log", os.environ) as lost,
        pytest.raises(EngineFailed, match=r"'lost' failed[\s\S]*nowhere"),
    ):
        lost.ask({"engine": {"model": str(tmp_path / "nowhere")}, "adapters": {}})
