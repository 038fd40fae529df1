"""vLLM with the plugin against the in-process reference and against stock vLLM: greedy tokens in float32."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny, tiny_tokenizer, tokens
from icarus import adapter
from icarus.context import Specialists

# This folder is a namespace package of the same name where vLLM is missing; it has no origin.
INSTALLED = getattr(importlib.util.find_spec("vllm"), "origin", None) is not None
pytestmark = pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed")

NEW = 12
BLOCK = 32  # the smallest that vLLM's CPU attention takes
LENGTHS = (1, 2, 31, 32, 33, 64, 97, 150)
SHAPE = {"head_dim": 32, "hidden_size": 128}  # of sizes that vLLM's CPU attention takes

Reply = dict[str, Any]


def randomize(model: Any, seed: int) -> Any:
    """LoRA that changes most predictions."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


class Shop:
    """A base model and adapters on disk, what the reference says of them, and engines that serve them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, folder / "base"
        tiny(**SHAPE).save_pretrained(self.base)
        for seed, name in enumerate(("sql", "chat")):
            adapter.save(randomize(adapter.attach(tiny(**SHAPE), rank=8), seed), folder / name)
        ordinary = adapter.attach_conventional(tiny(**SHAPE), rank=8)
        adapter.save_conventional(randomize(ordinary, 7), folder / "plain")
        model = tiny(**SHAPE)
        model.generation_config.eos_token_id = None  # engines are told to ignore it, too
        self.team = Specialists(model, tiny_tokenizer())
        for name in ("sql", "chat"):
            self.team.add(name, folder / name)

    def reference(self, model: str, prompt: Sequence[int], count: int = NEW) -> list[int]:
        """Greedy tokens of the in-process reference."""
        return self.team.context().append(prompt).generate(model, max_new_tokens=count).token_ids

    def serve(self, batches: list[list[tuple[str, Sequence[int]]]], *, plugin: bool = True, **engine: Any) -> Any:
        """Replies of one engine to batches of (model, prompt), asked one batch after another."""
        options = {
            "model": str(self.base),
            "dtype": "float32",
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "max_model_len": 256,
            "block_size": BLOCK,
            "max_num_seqs": 16,
            "enable_lora": True,
            "max_loras": 3,
            "max_lora_rank": 8,
            "seed": 0,
            **engine,
        }
        job = {
            "engine": options,
            "adapters": {
                name: {"lora_name": name, "lora_int_id": number, "lora_path": str(self.folder / name)}
                for number, name in enumerate(("sql", "chat", "plain", "damaged"), 1)
            },
            "batches": [
                [{"model": model, "prompt": list(prompt), "max_tokens": NEW} for model, prompt in batch]
                for batch in batches
            ],
            "result": str(self.folder / "result.json"),
        }
        return self._run(job, plugin)

    def _run(self, job: dict[str, Any], plugin: bool) -> Any:
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "icarus" if plugin else ""}
        script = Path(__file__).with_name("engine_job.py")
        done = subprocess.run(
            [sys.executable, str(script)], input=json.dumps(job), env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
        return json.loads(Path(job["result"]).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"))


def prompts(seed: int) -> list[list[int]]:
    """Of many lengths, with no prefix in common."""
    return [tokens(length, seed=seed + index).tolist() for index, length in enumerate(LENGTHS)]


def of(replies: list[Reply]) -> list[list[int]]:
    return [reply["tokens"] for reply in replies]


MIXED = [(model, prompt) for prompt in prompts(100) for model in ("base", "sql", "chat", "plain")]


@pytest.fixture(scope="module")
def stock(shop: Shop) -> Any:
    """Stock vLLM: the mixed batch; and ICaRus adapters as plain LoRA, which is wrong."""
    return shop.serve([MIXED], plugin=False)


@pytest.fixture(scope="module")
def served(shop: Shop) -> Any:
    """One engine: every request alone, all in one batch, and one prompt by one model after another."""
    alone = [[(model, prompt)] for prompt in prompts(0) for model in ("base", "sql", "chat")]
    prompt = tokens(97, seed=300).tolist()
    in_turn = [[(model, prompt)] for model in ("sql", "chat", "base", "plain", "plain")]
    replies = shop.serve([*alone, MIXED, *in_turn])
    count = len(alone)
    return {"alone": (alone, replies[:count]), "mixed": replies[count], "turn": (prompt, replies[count + 1 :])}


def test_alone(shop: Shop, served: Any) -> None:
    asked, replies = served["alone"]
    for [(model, prompt)], [reply] in zip(asked, replies, strict=True):
        assert reply["tokens"] == shop.reference(model, prompt), (model, len(prompt))


def test_in_a_mixed_batch(shop: Shop, served: Any, stock: Any) -> None:
    for (model, prompt), got, plain in zip(MIXED, of(served["mixed"]), of(stock[0]), strict=True):
        wanted = plain if model in ("base", "plain") else shop.reference(model, prompt)
        assert got == wanted, (model, len(prompt))


def test_the_adapters_differ_and_as_plain_lora_they_are_wrong(shop: Shop, stock: Any) -> None:
    """Without this the tests above could not fail."""
    answers = {(model, len(prompt)): got for (model, prompt), got in zip(MIXED, of(stock[0]), strict=True)}
    longest = max(LENGTHS)
    assert len({tuple(answers[model, longest]) for model in ("base", "sql", "chat", "plain")}) == 4
    wrong = [model for (model, prompt), got in zip(MIXED, of(stock[0]), strict=True)
             if model in ("sql", "chat") and got != shop.reference(model, prompt)]  # fmt: skip
    assert len(wrong) > len(LENGTHS)


def test_the_cache_is_shared_by_those_who_may(shop: Shop, served: Any) -> None:
    prompt, replies = served["turn"]
    whole_blocks = len(prompt) // BLOCK * BLOCK
    cached = [reply[0]["cached"] for reply in replies]
    assert cached == [0, whole_blocks, whole_blocks, 0, whole_blocks], "sql, chat, base; plain has a cache of its own"
    for model, [reply] in zip(("sql", "chat", "base"), replies, strict=False):
        assert reply["tokens"] == shop.reference(model, prompt)


def test_with_chunked_prefill_and_preemption(shop: Shop, stock: Any) -> None:
    """A budget of 24 rows cuts every longer prompt, and 14 blocks hold only a few requests at a time."""
    options = {"max_num_batched_tokens": 24, "num_gpu_blocks_override": 14, "enable_prefix_caching": False}
    [replies] = shop.serve([MIXED], **options)
    for (model, prompt), got, plain in zip(MIXED, of(replies), of(stock[0]), strict=True):
        wanted = plain if model in ("base", "plain") else shop.reference(model, prompt)
        assert got == wanted, (model, len(prompt))
