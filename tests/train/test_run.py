"""Training end to end on a tiny model: what is learnt, the arithmetic of the loss, interruptions, and refusals."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft.utils import save_and_load as peft_files
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import reference
from icarus import Specialists, adapter, processor
from icarus.chat_template import Codec
from icarus.errors import AdapterError, DataError, InputError, UnsupportedModelError
from icarus.streams import IGNORED, TwoStreams
from icarus.train import IcarusSFTTrainer, data
from icarus.train import run as under_test
from icarus.train.config import TRAIN, IcarusSFTConfig, TrainConfig
from icarus.train.progress import Progress
from saved import save_adapter, save_base, save_rows
from strict_skips import NO_CPU_TORCH
from tiny_models import lora_of, shape_of, tiny, tiny_tokenizer, with_adapters

ROWS = [{"prompt": p, "completion": c} for p, c in (("one:", "uno"), ("two:", "dos"), ("three:", "tres"))]
MANY = [{"prompt": f"{n}+{m}=", "completion": str(n + m)} for n in range(3, 6) for m in range(8, 12)]
DEFAULTS = {"use_cpu": True, "save_strategy": "no", "logging_steps": 1, "seed": 3}
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "warmup_steps": 0, "learning_rate": 0.5, "max_steps": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


Train = Callable[..., dict[str, Any]]
_TRAIN_CONFIG = set(TrainConfig.__dataclass_fields__)


def settings(**options: Any) -> Any:
    return IcarusSFTConfig(**DEFAULTS | options)


@pytest.fixture
def train(base: Path, tmp_path: Path) -> Train:
    """Run ``icarus train`` in process; the adapter lands in ``tmp_path/out`` unless told otherwise."""

    def run(rows: list[dict[str, Any]] = ROWS, **options: Any) -> dict[str, Any]:
        source = save_rows(tmp_path / "data.jsonl", *rows)
        named = {"base": str(base), "data": str(source), "output": str(tmp_path / "out"), "rank": 4}
        named["dtype"] = "float32"  # on every processor
        named |= {k: options.pop(k) for k in [*options] if k in _TRAIN_CONFIG}
        return under_test.train(TrainConfig(**named), settings(**options))

    return run


@pytest.mark.skipif(torch.version.cuda is not None, reason=NO_CPU_TORCH)
@pytest.mark.parametrize(("slow", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_on_a_cpu_the_processor_decides_on_the_dtype(
    slow: bool, dtype: torch.dtype, base: Path, train: Train, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(processor, "slow_in_bfloat16", lambda: slow)
    loaded = under_test.base_model.load
    models = []
    monkeypatch.setattr(
        under_test.base_model, "load", lambda *args, **options: models.append(loaded(*args, **options)) or models[-1]
    )
    train(dtype="auto", max_steps=1)
    assert models[0][0].dtype is dtype
    assert f"Base weights in {str(dtype).removeprefix('torch.')}" in capsys.readouterr().err


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def left(tmp_path: Path) -> set[str]:
    return {path.name for path in tmp_path.iterdir()} - {"data.jsonl"}


# ------------------------------------------------------------------------------------------ the whole way


def test_a_specialist_says_what_it_was_taught_and_the_base_is_untouched(
    train: Train, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(base)
    trainers: list[Any] = []
    make = under_test._trainer
    monkeypatch.setattr(under_test, "_trainer", lambda *args: trainers.append(make(*args)) or trainers[-1])
    report = train(num_train_epochs=30, per_device_train_batch_size=3, learning_rate=2e-2)
    losses = [entry["loss"] for entry in trainers[0].state.log_history if "loss" in entry]
    assert losses[0] > 3
    assert losses[-1] < 0.1
    assert {k: report[k] for k in ("output", "method", "examples", "left_out", "steps")} == {
        "output": str(tmp_path / "out"),
        "method": "icarus",
        "examples": 3,
        "left_out": 0,
        "steps": 30,
    }

    trained = {k.replace(".base_layer", ""): v for k, v in trainers[0].model.get_base_model().state_dict().items()}
    assert_same({k: v for k, v in trained.items() if ".lora_" not in k}, tiny().state_dict(), **EXACT)
    assert contents(base) == before

    info = adapter.verify(tmp_path / "out", base)
    assert (info.rank, info.targets) == (4, ("down_proj", "gate_proj", "o_proj", "q_proj", "up_proj"))
    team = Specialists.load(str(base), {"es": tmp_path / "out"})
    turns = {row["prompt"]: team.context().append(row["prompt"]).generate("es", max_new_tokens=9) for row in ROWS}
    assert {prompt: (turn.text, turn.finish_reason) for prompt, turn in turns.items()} == {
        row["prompt"]: (row["completion"], "stop") for row in ROWS
    }
    assert left(tmp_path) <= {"out", "out.run"}


def test_the_conventional_baseline_is_refused_a_shared_cache(train: Train, base: Path, tmp_path: Path) -> None:
    report = train([{"prompt": "a:", "completions": ["b", "c"]}], method="lora", max_steps=2)
    assert (report["method"], report["examples"], report["steps"]) == ("lora", 2, 2)
    modules = {re.sub(r".*\.(\w+)\.lora_[AB]\.weight", r"\1", name) for name in weights(tmp_path / "out")}
    assert {"k_proj", "v_proj", "q_proj", "down_proj"} <= modules
    with pytest.raises(AdapterError, match="no ICaRus marker"):
        adapter.verify(tmp_path / "out", base)


def test_the_baseline_is_saved_without_questions_and_its_card_says_what_it_is(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: Any) -> None:
        raise AssertionError("PEFT asks the Hub for the config of the base model.")

    load = under_test.base_model.load

    def renamed(*args: Any, **options: Any) -> Any:
        model, codes = load(*args, **options)
        model.name_or_path = model.config._name_or_path = "owner/name"  # which is no folder
        return model, codes

    monkeypatch.setattr(under_test.base_model, "load", renamed)
    monkeypatch.setattr(peft_files, "check_file_exists_on_hf_hub", ask)
    train(ROWS, method="lora", max_steps=1, save_strategy="steps", save_steps=1)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "base_model: owner/name" in card
    assert "no other model" in card


def test_metrics_and_logs(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = save_rows(tmp_path / "held_out.jsonl", *MANY[:4])
    report = train(MANY[4:], eval_data=str(held_out), report_to="tensorboard", max_steps=2)
    assert report["metrics"].keys() >= {"train_loss", "eval_loss", "eval_mean_token_accuracy", "eval_num_tokens"}
    assert report["metrics"]["eval_loss"] > 1
    assert [path for path in (tmp_path / "out.run").rglob("*tfevents*") if path.stat().st_size]
    lines = capsys.readouterr().err.splitlines()
    assert [
        line for line in lines if re.match(r"step 2/2: loss [\d.]+, mean_token_accuracy [\d.]+, tokens/s \d+,", line)
    ]


def test_half_precision_on_disk_and_in_the_base(train: Train, base: Path, tmp_path: Path) -> None:
    report = train(dtype="bfloat16", adapter_dtype="bfloat16", max_steps=8, learning_rate=2e-2)
    assert report["metrics"]["train_loss"] < 5
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
    adapter.verify(tmp_path / "out", base)


def test_examples_without_loss_are_counted_aloud(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    report = train([*ROWS, {"prompt": "x" * 60, "completion": "y"}], max_length=50, max_steps=1)
    assert (report["examples"], report["left_out"]) == (3, 1)
    assert "1 of 4 examples of" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- the loss itself


def trainer_of(rows: list[dict[str, Any]], tmp_path: Path, model: Any = None, **options: Any) -> Any:
    """A trainer whose adapter is random and far from zero, the same each time."""
    model = with_adapters(tiny(), ("default",)) if model is None else model
    options = {"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": len(rows)} | options
    dataset = Dataset.from_list(rows)
    return IcarusSFTTrainer(model, settings(**options), train_dataset=dataset, processing_class=tiny_tokenizer())


def loss_of(trainer: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of the first batch, and the gradient of each adapter weight."""
    (batch, *_) = trainer.get_train_dataloader()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    return loss.detach(), gradients


def assert_same_training(one: Any, other: Any) -> None:
    (loss, gradients), (other_loss, other_gradients) = (loss_of(trainer) for trainer in (one, other))
    torch.testing.assert_close(loss, other_loss)
    assert_same(gradients, other_gradients, **CLOSE)


def test_loss_and_gradients_are_those_of_the_equations(tmp_path: Path) -> None:
    """Against two plain passes without cache over every position: tests/reference.py."""
    rows = [MANY[0], MANY[-1], ROWS[2]]
    trainer = trainer_of(rows, tmp_path)
    loss, gradients = loss_of(trainer)

    model = with_adapters(tiny(), ("default",))
    lora = {
        name: (down.clone().requires_grad_(), up.clone().requires_grad_(), scale)
        for name, (down, up, scale) in lora_of(model, "default").items()
    }
    base, total, count = tiny(), torch.zeros(()), 0
    for row in rows:
        columns = data.tokenize(row, Codec(tiny_tokenizer()), None)
        logits = reference.two_streams(
            base.state_dict(), lora, torch.tensor(columns["input_ids"]), shape_of(base.config)
        ).logits
        targets = torch.tensor(columns["labels"])[1:]
        total = total + torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum", ignore_index=IGNORED)
        count += int((targets != IGNORED).sum())
    (total / count).backward()
    torch.testing.assert_close(loss, (total / count).detach())
    naive = {
        f"base_model.model.{name}.lora_{half}.default.weight": pair[i].grad
        for name, pair in lora.items()
        for i, half in enumerate("AB")
    }
    assert_same(gradients, naive, **CLOSE)


@pytest.mark.parametrize(("size", "accumulate"), [(3, 2), (1, 6)])
def test_accumulated_steps_equal_one_big_batch(size: int, accumulate: int, tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "a", "completion": "b" * 30}, *MANY[:2]]  # unequal counts of loss tokens
    big = trainer_of(rows, tmp_path, **SGD)
    small = trainer_of(rows, tmp_path, **SGD, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate)
    for trainer in (big, small):
        trainer.train()
    one, other = (t.state.log_history[0] for t in (big, small))
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert one["num_tokens"] == other["num_tokens"] == sum(len(r["prompt"] + r["completion"]) + 1 for r in rows)
    assert_same(dict(big.model.named_parameters()), dict(small.model.named_parameters()), **CLOSE)
    start = with_adapters(tiny(), ("default",)).state_dict()
    assert any(not torch.equal(v, start[n]) for n, v in big.model.state_dict().items())


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packed_rows_train_like_separate_ones(strategy: str, tmp_path: Path) -> None:
    packed = trainer_of(MANY, tmp_path, packing=True, packing_strategy=strategy, max_length=24)
    assert len(packed.train_dataset) < len(MANY) / 2
    assert_same_training(packed, trainer_of(MANY, tmp_path))
    packed.train()


BRANCHED = [
    {"prompt": "a long prompt of them all:", "completions": ["one", "twotwo", "x"]},
    {"prompt": "b:", "completions": ["y", "zz"]},
]


def test_several_completions_train_like_separate_rows_and_encode_their_prompt_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = TwoStreams.encode

    def counted(self: TwoStreams, input_ids: Tensor, *args: Any, batch: Any, **kwargs: Any) -> Tensor:
        encoded.append(int((batch.document_ids >= 0).sum()))
        return encode(self, input_ids, *args, batch=batch, **kwargs)

    monkeypatch.setattr(TwoStreams, "encode", counted)
    separate = [part for row in BRANCHED for part in data.separate(row)]
    separate = [{k: v for k, v in row.items() if k != data.LINE} for row in separate]
    trainers = trainer_of(BRANCHED, tmp_path), trainer_of(separate, tmp_path)
    encoded.clear()  # of the probes that stand before any training
    assert_same_training(*trainers)
    spared = sum(len(row["prompt"]) * (len(row["completions"]) - 1) for row in BRANCHED)
    assert encoded[1] == sum(len(r["prompt"] + r["completion"]) + 1 for r in separate)
    assert encoded[0] == encoded[1] - spared


def test_max_length_counts_positions_not_tokens_of_all_completions(tmp_path: Path) -> None:
    longest = len(BRANCHED[0]["prompt"]) + len("twotwo") + 1
    assert_same_training(trainer_of(BRANCHED, tmp_path, max_length=longest), trainer_of(BRANCHED, tmp_path))


@pytest.mark.parametrize("rows", [ROWS, BRANCHED], ids=["plain", "branched"])
def test_gradient_checkpointing_trains_the_same(rows: Any, tmp_path: Path) -> None:
    assert_same_training(trainer_of(rows, tmp_path, gradient_checkpointing=True), trainer_of(rows, tmp_path))


def test_dropout_is_for_the_decoder_and_evaluation_is_without_it(tmp_path: Path) -> None:
    trainer = trainer_of(ROWS, tmp_path, with_adapters(tiny(), ("default",), lora_dropout=0.5))
    (batch, *_) = trainer.get_train_dataloader()
    plain = loss_of(trainer_of(ROWS, tmp_path))[0]
    trainer.model.train()
    assert abs(float(trainer.compute_loss(trainer.model, batch).detach() - plain)) > 1e-3
    trainer.model.eval()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch).detach(), plain)


# -------------------------------------------------------------------------------------------- interruptions


class _StoppedError(RuntimeError):
    pass


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise _StoppedError

    monkeypatch.setattr(Progress, "on_step_end", on_step_end)


STEPS: dict[str, Any] = {
    "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4,
    "dropout": 0.2,
}  # fmt: skip
SCRIPT = """
import json, os, sys
from icarus.train import run, config
from icarus.train.progress import Progress

train, sft, die_at = json.loads(sys.argv[1])

def on_step_end(self, args, state, control, **kwargs):
    if state.global_step == die_at:
        os.kill(os.getpid(), 9)

Progress.on_step_end = on_step_end
run.train(config.TrainConfig(**train), config.IcarusSFTConfig(**sft))
"""


def script(
    base: Path, tmp_path: Path, *launcher: str, die_at: int | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """What the fixture ``train`` does, in processes of its own."""
    (tmp_path / "main.py").write_text(SCRIPT)
    named = {"base": str(base), "data": str(tmp_path / "data.jsonl"), "output": str(tmp_path / "out"), "rank": 4}
    named["dtype"] = "float32"  # on every processor
    named |= {k: options.pop(k) for k in [*options] if k in _TRAIN_CONFIG}
    arguments = json.dumps([named, DEFAULTS | options, die_at])
    return subprocess.run(
        [sys.executable, *launcher, str(tmp_path / "main.py"), arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the processes of ``script`` have: how a sum is divided among threads decides its last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_resumes_to_the_same_weights(train: Train, base: Path, tmp_path: Path) -> None:
    train(MANY, output=str(tmp_path / "straight"), **STEPS)
    done = script(base, tmp_path, die_at=5, **STEPS)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert left(tmp_path) == {"straight", "straight.run", "out.run", "main.py"}

    (tmp_path / "out.run" / "checkpoint-50").mkdir()  # as left by a kill in the midst of writing it
    report = train(MANY, resume=True, **STEPS)
    assert report["steps"] == 6
    assert_same(weights(tmp_path / "out"), weights(tmp_path / "straight"), **EXACT)
    adapter.verify(tmp_path / "out.run" / "checkpoint-6", base)


@pytest.mark.parametrize("length", [{"max_steps": 6}, {"max_steps": -1, "num_train_epochs": 0.4}])
def test_a_run_that_had_ended_takes_no_further_step(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], length: dict[str, Any]
) -> None:
    """As where it was interrupted behind its last checkpoint, before the adapter was written."""
    first = train(MANY * 4, **STEPS | length)
    before = weights(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    again = train(MANY * 4, resume=True, **STEPS | length)
    assert again["steps"] == first["steps"]
    assert "The run had ended after" in capsys.readouterr().err
    assert math.isclose(again["metrics"]["train_loss"], first["metrics"]["train_loss"], rel_tol=1e-3)
    assert_same(weights(tmp_path / "out"), before, **EXACT)


def test_a_run_that_had_ended_before_it_logged_a_loss_has_none(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    """In place of NaN, which no JSON has."""
    train(MANY, **STEPS, logging_steps=10)
    again = train(MANY, resume=True, **STEPS, logging_steps=10)
    assert again["metrics"] == {}
    under_test.report(again | {"steps": 1})
    assert re.search(r"out: 1 step in [\d.]+ s$", capsys.readouterr().err)


def test_a_run_that_had_ended_keeps_its_best_checkpoint(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where Transformers itself takes no further step, at the end of an epoch."""
    rows = save_rows(tmp_path / "eval.jsonl", *MANY[:4])
    best: dict[str, Any] = {"eval_data": str(rows), "eval_strategy": "steps", "eval_steps": 2}
    best |= STEPS | {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    train(MANY, **best)
    before = weights(tmp_path / "out")
    last = weights(tmp_path / "out.run" / "checkpoint-6")
    assert any(not torch.equal(before[name], last[name]) for name in before)
    train(MANY, resume=True, **best)
    assert_same(weights(tmp_path / "out"), before, **EXACT)


def test_a_run_of_other_settings_is_not_resumed(train: Train, base: Path, tmp_path: Path) -> None:
    """Its weights would get a config that is not theirs, or the fingerprint of a base model that they never saw."""
    steps = STEPS | {"max_steps": 2}
    train(MANY, **steps)
    before = weights(tmp_path / "out")
    other = AutoModelForCausalLM.from_pretrained(base)
    next(other.parameters()).data.mul_(2)
    shutil.copytree(base, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    for changed, message in (
        ({"alpha": 99}, "checkpoint-2 is of a run with alpha 8, and this one has 99; give what it had, or remove"),
        ({"rank": 2}, "with rank 4, and this one has 2"),
        ({"method": "lora"}, "with method icarus, and this one has lora"),
        ({"base": str(tmp_path / "other")}, "with a base model of fingerprint "),
    ):
        with pytest.raises(InputError, match=message):
            train(MANY, resume=True, **steps | changed)
    assert_same(weights(tmp_path / "out"), before, **EXACT)


def test_starting_over_a_broken_run_and_resuming_none_are_refused(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"nothing to resume: .*out.run .* without --resume"):
        train(resume=True)
    with monkeypatch.context() as patched:
        stop_at(3, patched)
        with pytest.raises(_StoppedError):
            train(MANY, **STEPS)
    with pytest.raises(InputError, match=r"out.run holds checkpoints .* --resume, or remove"):
        train(MANY, **STEPS)
    assert left(tmp_path) == {"out.run"}


def test_an_adapter_stays_as_it_was_until_the_new_one_is_complete(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(tmp_path / "out")
    old = contents(tmp_path / "out")
    with monkeypatch.context() as patched:
        stop_at(1, patched)
        with pytest.raises(_StoppedError):
            train(max_steps=2)
    assert contents(tmp_path / "out") == old
    train(max_steps=2)
    assert contents(tmp_path / "out") != old


def test_training_that_diverges_leaves_no_adapter(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(self: Any, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    monkeypatch.setattr(Progress, "on_step_end", diverge)
    with pytest.raises(AdapterError, match="NaN or infinity"):
        train(max_steps=2)
    assert left(tmp_path) <= {"out.run"}


# ------------------------------------------------------------------------------------- several processes


def test_two_processes_train_like_one_with_the_double_batch(train: Train, base: Path, tmp_path: Path) -> None:
    """DistributedDataParallel over gloo, with unequal counts of loss tokens."""
    rows = [{"prompt": "a", "completion": "b" * n} for n in (1, 30, 2, 20, 3, 10, 4, 5)]
    options = SGD | {
        "max_grad_norm": 0,
        "max_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 0.05,
    }
    train(rows, output=str(tmp_path / "alone"), per_device_train_batch_size=4, **options)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = script(base, tmp_path, *launcher, per_device_train_batch_size=2, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(weights(tmp_path / "out"), weights(tmp_path / "alone"), rtol=1e-4, atol=1e-6)
    fresh = weights(tmp_path / "alone.run" / "checkpoint-2")
    assert any(not torch.equal(tensor, fresh[name]) for name, tensor in weights(tmp_path / "alone").items())


def test_a_model_sharded_over_two_processes_trains_and_saves_like_a_whole_one(tmp_path: Path) -> None:
    job = Path(__file__).with_name("fsdp_job.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, job, tmp_path], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(weights(tmp_path / "sharded"), weights(tmp_path / "whole"))


# ---------------------------------------------------------------------------------- settings and refusals

FLAGS = ["--base", "b", "--data", "d.jsonl", "--output", "o"]


def test_a_recipe_is_the_same_as_flags_and_flags_win(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("base: b\ndata: d.jsonl\noutput: o\nrank: 8\nlearning_rate: 1e-3\ntargets: [q_proj, o_proj]\n")
    flags = [*FLAGS, "--rank", "8", "--learning_rate", "1e-3", "--targets", "q_proj", "o_proj"]
    by_recipe, by_flags = TRAIN.parse(["--config", str(recipe)]), TRAIN.parse(flags)
    assert (
        by_recipe[0]
        == by_flags[0]
        == TrainConfig(base="b", data="d.jsonl", output="o", rank=8, targets=["q_proj", "o_proj"])
    )
    assert by_recipe[1].to_dict() == by_flags[1].to_dict()
    assert by_recipe[1].learning_rate == 1e-3
    changed = TRAIN.parse([f"--config={recipe}", "--rank", "2", "--base", "c"])[0]
    assert (changed.rank, changed.base, changed.data) == (2, "c", "d.jsonl")


@pytest.mark.parametrize(
    ("recipe", "flags", "what"),
    [
        ("base: b\ndata: d\noutput: o\nlerning_rate: 1\n", [], "lerning_rate"),
        (None, [*FLAGS, "--lerning_rate", "1"], "lerning_rate"),
        ("base: b\n", ["--data", "d"], "required: --output"),
        (None, [], "required: --base, --data, --output"),
        (None, [*FLAGS, "--rank", "0"], "rank must be a positive integer, not 0"),
        (None, [*FLAGS, "--rank", "eight"], "rank.*eight"),
        (None, [*FLAGS, "--alpha", "0"], "alpha must be a positive integer, not 0"),
        ("base: b\ndata: d\noutput: o\nalpha: 0.5\n", [], "alpha must be .* not 0.5"),
        (None, [*FLAGS, "--config="], "--config needs"),
        (None, ["--config=none.yaml"], "none.yaml"),
        (None, [*FLAGS, "--dropout", "1"], "dropout must be .* not 1"),
        (None, [*FLAGS, "--method", "qlora"], "method.*qlora"),
        ("base: b\ndata: d\noutput: o\nrank: 8.5\n", [], "rank must be .* not 8.5"),
        ("base: b\ndata: d\noutput: o\nmethod: qlora\n", [], "method must be one of icarus, lora, not 'qlora'"),
        ("base: b\ndata: d\noutput: o\ndtype: float16\n", [], "dtype must be .* not 'float16'"),
        ("base: b\ndata: d\noutput: o\ntargets: q_proj\n", [], "targets must be .* not 'q_proj'"),
        ("base: [\n", [], "recipe.yaml"),
        ("- base\n", [], "recipe.yaml"),
        (None, ["--config", "none.yaml"], "none.yaml"),
        (None, [*FLAGS, "--config"], "--config"),
        (None, [*FLAGS, "--eval_strategy", "sometimes"], "sometimes"),
    ],
)
def test_bad_settings_are_named_in_one_sentence(
    recipe: str | None, flags: list[str], what: str, tmp_path: Path
) -> None:
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(recipe)
        flags = ["--config", str(tmp_path / "recipe.yaml"), *flags]
    with pytest.raises(InputError, match=what) as caught:
        TRAIN.parse(flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "what"),
    [
        ({"targets": ["q_proj", "k_proj"]}, UnsupportedModelError, r"k_proj.*target_modules=\['down_proj'"),
        ({"targets": ["no_proj"]}, AdapterError, "no_proj"),
        ({"base": "./nowhere"}, InputError, "'./nowhere'"),
        ({"data": "nothing.jsonl"}, DataError, "nothing.jsonl"),
        ({"eval_data": "nothing.jsonl"}, DataError, "nothing.jsonl"),
        ({"max_length": 3}, DataError, "carries loss"),
        ({"rows": BRANCHED, "packing": True}, InputError, "Packing and several completions"),
        ({"rows": BRANCHED, "packing": True, "method": "lora"}, InputError, "Packing and several completions"),
        ({"output": "file"}, InputError, "file is a file"),
        ({"label_smoothing_factor": 0.1}, InputError, "label_smoothing_factor=0.1"),
        ({"loss_type": "dft"}, InputError, "loss_type='dft'"),
        ({"completion_only_loss": False}, InputError, "completion_only_loss=False"),
        pytest.param(
            *({"truncation_mode": "keep_end"}, InputError, "truncation_mode='keep_end'"),
            marks=pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning"),
        ),
        ({"dataset_text_field": "body"}, InputError, "dataset_text_field='body'"),
        ({"rows": BRANCHED, "padding_free": True}, InputError, "Packing and several completions"),
    ],
)
def test_refused_before_anything_is_written(
    options: dict[str, Any], error: type[Exception], what: str, train: Train, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(error, match=what) as caught:
        train(**options)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert left(tmp_path) == {"file"}


def test_the_trainer_alone_refuses_as_well(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="packing=False"):
        trainer_of(BRANCHED, tmp_path, packing=True, max_length=64)
    streamed = Dataset.from_list(ROWS).to_iterable_dataset()
    options = settings(output_dir=str(tmp_path), max_steps=1)
    with pytest.raises(InputError, match="Streaming"):
        IcarusSFTTrainer(tiny(), options, train_dataset=streamed, processing_class=tiny_tokenizer())
    with pytest.raises(InputError, match="padding_free=False"):
        trainer_of(BRANCHED, tmp_path, padding_free=True, max_length=None)
    for name in ("formatting_func", "compute_loss_func", "compute_metrics"):
        with pytest.raises(InputError, match=f"^{name} "):
            IcarusSFTTrainer(tiny(), options, train_dataset=Dataset.from_list(ROWS), **{name: print})
    attached = adapter.attach(tiny())
    with pytest.raises(InputError, match=r"^peft_config "):
        IcarusSFTTrainer(attached, options, peft_config=attached.peft_config["default"])
    with pytest.raises(InputError, match=r"^quantization_config "):
        IcarusSFTTrainer("owner/name", options, quantization_config=object())
    with pytest.raises(InputError, match=r"^model_init_kwargs="):
        IcarusSFTTrainer("owner/name", settings(output_dir=str(tmp_path), model_init_kwargs={"revision": "main"}))
    with pytest.raises(InputError, match="give processing_class"):
        IcarusSFTTrainer(tiny(), options, train_dataset=Dataset.from_list(ROWS))
    with pytest.raises(DataError, match="the data set:3: field 'completion' is empty"):
        trainer_of([*ROWS, {"prompt": "a", "completion": ""}], tmp_path)
    with pytest.raises(UnsupportedModelError, match="feed"):
        trainer_of(ROWS, tmp_path, with_adapters(tiny(), ("default",), target_modules=["k_proj", "q_proj"]))


def test_the_trainer_makes_its_own_adapter_and_saves_icarus_directories(base: Path, tmp_path: Path) -> None:
    trainer = IcarusSFTTrainer(
        str(base), settings(output_dir=str(tmp_path / "run"), max_steps=1), train_dataset=Dataset.from_list(ROWS)
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    assert adapter.verify(tmp_path / "out", base).rank == 16


def test_a_model_without_given_tokenizer_finds_its_own_and_keeps_completions_apart(base: Path, tmp_path: Path) -> None:
    model = with_adapters(tiny(), ("default",))
    model.config._name_or_path = str(base)
    options = settings(output_dir=str(tmp_path / "run"), per_device_train_batch_size=len(BRANCHED))
    alone = IcarusSFTTrainer(model, options, train_dataset=Dataset.from_list(BRANCHED))
    assert_same_training(alone, trainer_of(BRANCHED, tmp_path))


def test_an_adapter_of_another_name_is_trained_and_saved(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(ROWS, tmp_path, adapter.attach(tiny(), name="sql", rank=4), **SGD, save_strategy="steps")
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    for folder in (tmp_path / "out", tmp_path / "run" / "checkpoint-1"):
        assert adapter.verify(folder, base).rank == 4
        assert any(tensor.any() for name, tensor in weights(folder).items() if "lora_B" in name)


END = tiny_tokenizer().eos_token_id


@pytest.mark.parametrize(
    ("stops", "options", "expected"),
    [
        (9, {}, ["will go on behind"]),
        ([9, 10], {}, ["will go on behind"]),
        ([9, END], {}, []),
        (END, {}, []),
        (9, {"eos_token": "~"}, ["give the eos_token '~'"]),
    ],
)
def test_answers_behind_which_the_base_model_goes_on_are_said_once(
    stops: int | list[int],
    options: dict[str, str],
    expected: list[str],
    train: Train,
    base: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By the command, for training and evaluation data together, and by the trainer."""
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    train(base=str(folder), eval_data=str(save_rows(tmp_path / "eval.jsonl", *ROWS)), max_steps=1, **options)
    chosen = settings(output_dir=str(tmp_path / "run"), max_steps=1, **options)
    IcarusSFTTrainer(str(folder), chosen, train_dataset=Dataset.from_list(ROWS))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("icarus.")]
    assert len(said) == 2 * len(expected)
    assert all(words in text for text, words in zip(said, 2 * expected, strict=True))


@pytest.mark.parametrize("method", ["icarus", "lora"])
def test_each_method_has_the_learning_rate_and_a_given_one_wins(
    method: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers: list[Any] = []
    make = under_test._trainer
    monkeypatch.setattr(under_test, "_trainer", lambda *args: trainers.append(make(*args)) or trainers[-1])
    for number, (given, wanted) in enumerate((({}, 2e-3), ({"learning_rate": 0.25}, 0.25))):
        train(method=method, max_steps=1, output=str(tmp_path / f"out{number}"), **given)
        assert trainers[-1].optimizer.defaults["lr"] == wanted
    assert trainer_of(ROWS, tmp_path).args.learning_rate == 2e-3
