"""A tiny base model with adapters on disk, engines that serve them, and what the in-process reference says of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from icarus import adapter
from icarus.context import Specialists
from specimens import CONVENTIONAL_DAMAGES, tensors
from tiny_models import tiny, tiny_tokenizer, tokens

JOB = Path(__file__).parent / "vllm" / "engine_job.py"
INTERPRETED = Path(__file__).parent / "interpreted"

NEW = 12
BLOCK = 32  # the smallest that vLLM's CPU attention takes
LENGTHS = (1, 2, 31, 32, 33, 64, 97, 150)
SHAPE = {"head_dim": 32, "hidden_size": 128}  # of sizes that vLLM's CPU attention takes

ADAPTERS = ("sql", "chat", "plain", "foreign", "wide", "uneven", "odd", "poisoned", "exploding")

Reply = dict[str, Any]
Step = dict[str, Any]
Asked = tuple[str, list[int]]


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

    def __init__(self, folder: Path, launcher: Launcher | None = None) -> None:
        self.folder, self.base, self.launcher = folder, folder / "base", launcher
        tiny(**SHAPE).save_pretrained(self.base)
        for seed, name in enumerate(("sql", "chat")):
            adapter.save(randomize(adapter.attach(tiny(**SHAPE), rank=8), seed), folder / name)
        adapter.save(adapter.attach(tiny(**SHAPE, seed=9), rank=8), folder / "foreign")
        ordinary = adapter.attach_conventional(tiny(**SHAPE), rank=8)
        adapter.save_conventional(randomize(ordinary, 7), folder / "plain")
        wide = adapter.attach_conventional(tiny(**SHAPE), rank=8, targets=["embed_tokens", "lm_head", "q_proj"])
        adapter.save_conventional(randomize(wide, 8), folder / "wide")
        patterns: dict[str, Any] = {
            "rank_pattern": {r"layers\.1\..*o_proj": 3, "up_proj": 2},
            "alpha_pattern": {"o_proj": 4},
        }
        uneven = adapter.attach(tiny(**SHAPE), LoraConfig(r=8, lora_alpha=16, **patterns))
        adapter.save(randomize(uneven, 3), folder / "uneven")
        odd = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"], **patterns)
        adapter.save_conventional(randomize(get_peft_model(tiny(**SHAPE), odd), 4), folder / "odd")
        shutil.copytree(folder / "plain", folder / "poisoned")
        CONVENTIONAL_DAMAGES["nan"][0](folder / "poisoned")
        shutil.copytree(folder / "plain", folder / "exploding")
        tensors(lambda values: [tensor.mul_(1e25) for tensor in values.values()])(folder / "exploding")
        model = tiny(**SHAPE)
        model.generation_config.eos_token_id = None  # engines are told to ignore it, too
        self.team = Specialists(model, tiny_tokenizer())
        for name in ("sql", "chat", "uneven"):
            self.team.add(name, folder / name)

    def reference(self, model: str, prompt: Sequence[int], count: int = NEW) -> list[int]:
        """Greedy tokens of the in-process reference."""
        return self.team.context().append(prompt).generate(model, max_new_tokens=count).token_ids

    def scores(self, model: str, prompt: Sequence[int]) -> list[float]:
        """Log-probability of every token of a prompt but the first."""
        if len(prompt) == 1:
            return []
        text = "".join(self.team.tokenizer.convert_ids_to_tokens(prompt[1:]))
        return self.team.context().append(prompt[:1]).score(text, [model])[model]

    def serve(
        self,
        steps: list[Step],
        *,
        plugin: bool = True,
        min_paired_keys: int = 0,
        variables: dict[str, str] | None = None,
        as_on_a_gpu: bool = False,
        triton_attention: bool = False,
        **engine: Any,
    ) -> Any:
        """What one engine answers to steps, taken one after another.

        ``min_paired_keys``: from how many keys on decodes are computed together with their decoder rows;
        ``variables`` are of its environment; ``as_on_a_gpu``: with buffers of a device, and scheduling ahead of it;
        ``triton_attention``: on model runner V2, with vLLM's Triton backend.
        """
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
        adapters = {
            name: {"lora_name": name, "lora_int_id": number, "lora_path": str(self.folder / name)}
            for number, name in enumerate(ADAPTERS, 1)
        }
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "icarus" if plugin else "", **(variables or {})}
        job = {"engine": options, "adapters": adapters, "steps": steps, "min_paired_keys": min_paired_keys}
        job |= {"as_on_a_gpu": as_on_a_gpu, "triton_attention": triton_attention}
        return self.launcher.run(self.folder, job, environment)

    def serve_parts(self, parts: dict[str, list[Step]], **options: Any) -> dict[str, Any]:
        """The same for steps of several parts; what the engine answers, by part."""
        results = iter(self.serve([step for part in parts.values() for step in part], **options))
        return {name: [next(results) for _ in part] for name, part in parts.items()}


class Launcher:
    """A process that has imported vLLM, of which engines are forked: importing takes longer than to start one."""

    def __init__(self, **variables: str) -> None:
        environment = {**os.environ, **variables}
        self._process = subprocess.Popen(
            [sys.executable, JOB],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=environment,
        )

    def run(self, folder: Path, job: dict[str, Any], environment: dict[str, str]) -> Any:
        """The results of one engine; fails with what it said if it ends otherwise or takes ten minutes."""
        result, log = folder / "result.json", folder / "engine.log"
        watchdog = Timer(600, self._kill)
        watchdog.start()
        status = self._ask({**job, "environment": environment, "result": str(result), "log": str(log)})
        watchdog.cancel()
        assert status == "0", f"status {status!r}: {log.read_text(encoding='utf-8', errors='replace')[-6000:]}"
        return json.loads(result.read_text(encoding="utf-8"))

    def _ask(self, job: dict[str, Any]) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def _kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        self._kill()
        self._process.communicate()


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def launcher_v2() -> Iterator[Launcher]:
    """For model runner V2, which needs Triton; on CPUs its interpreter takes the place of a compiler."""
    paths = [str(INTERPRETED), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {"PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    variables["TORCHDYNAMO_DISABLE"] = "1"  # its compiler for CPUs takes Triton for one that is there
    launcher = Launcher(**variables)
    yield launcher
    launcher.close()


@pytest.fixture(scope="session", params=["V1", "V2"])
def either(shop: Shop, request: pytest.FixtureRequest) -> Shop:
    """The shop, with engines that have one model runner or the other."""
    if request.param == "V1":
        return shop
    other = copy(shop)
    other.launcher = request.getfixturevalue("launcher_v2")
    return other


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory, launcher: Launcher) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"), launcher)


def prompts(seed: int) -> list[list[int]]:
    """Of many lengths, with no prefix in common."""
    return [tokens(length, seed=seed + index).tolist() for index, length in enumerate(LENGTHS)]


def ask(*asked: Asked, **sampling: Any) -> Step:
    """Requests that are in the engine together, each a model and a prompt."""
    options = {"max_tokens": NEW, **sampling}
    return {"ask": [{"model": model, "prompt": prompt, "sampling": options} for model, prompt in asked]}


def of(replies: list[Reply]) -> list[list[int]]:
    return [reply["tokens"] for reply in replies]
