"""Distillation: the loss by plain passes, what stays as it was, resuming, the command, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor

import reference
from icarus import Specialists, adapter, cli
from icarus.chat_template import Codec
from icarus.errors import AdapterError, DataError, InputError, UnsupportedModelError
from icarus.streams import IGNORED, Batch, TwoStreams
from icarus.train import IcarusDistillationConfig, IcarusDistillationTrainer, data, distillation, own_answers
from icarus.train import run as command
from icarus.train.config import DISTILL, DistillConfig
from icarus.train.progress import Progress
from icarus.train.teacher import Teacher
from saved import save_adapter, save_base, save_rows
from tiny_models import lora_of, shape_of, tiny, tiny_tokenizer, with_adapters

ROWS = [{"prompt": p, "completion": c} for p, c in (("one:", "uno"), ("two, please:", "dos"), ("three:", "tres"))]
BRANCHED = [
    {"prompt": "a long prompt of them all:", "completions": ["one", "twotwo", "x"]},
    {"prompt": "b:", "completions": ["y", "zz"]},
]
DEFAULTS: dict[str, Any] = {"use_cpu": True, "save_strategy": "no", "logging_steps": 1, "seed": 3}
EXACT = {"rtol": 0, "atol": 0}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def save_teacher(folder: Path, model: Any = None, **lora: Any) -> Path:
    """A conventional adapter whose weights do something, on K and V as well."""
    taught = with_adapters(tiny() if model is None else model, ("default",), seed=5, target_modules=ALL, **lora)
    return adapter.save_conventional(taught, folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def trainer_of(rows: list[dict[str, Any]], teacher: Path, **options: Any) -> Any:
    """A trainer whose student is random and far from zero, the same each time."""
    options = {"output_dir": "unused", "per_device_train_batch_size": len(rows)} | DEFAULTS | options
    return IcarusDistillationTrainer(
        with_adapters(tiny(), ("default",)),
        teacher,
        IcarusDistillationConfig(**options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )


def loss_of(trainer: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of the first batch, and the gradient of each adapter weight."""
    (batch, *_) = trainer.get_train_dataloader()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


# --------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize(("ratio", "temperature"), [(0.3, 1.0), (1.0, 2.0), (0.0, 1.0)])
def test_loss_and_gradients_are_those_of_the_equations(
    ratio: float, temperature: float, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student by tests/reference.py, the teacher by Transformers and PEFT, one row at a time and every position."""
    monkeypatch.setattr(distillation, "_CHUNK", 4)
    loss, gradients = loss_of(trainer_of(ROWS, teacher, kd_ratio=ratio, temperature=temperature))

    lora = {
        name: (down.clone().requires_grad_(), up.clone().requires_grad_(), scale)
        for name, (down, up, scale) in lora_of(with_adapters(tiny(), ("default",)), "default").items()
    }
    plain, taught, total, count = tiny(), adapter.load(tiny(), teacher, verify=False), torch.zeros(()), 0
    for row in ROWS:
        columns = data.tokenize(row, Codec(tiny_tokenizer()), None)
        ids, targets = torch.tensor(columns["input_ids"]), torch.tensor(columns["labels"])[1:]
        own = reference.two_streams(plain.state_dict(), lora, ids, shape_of(plain.config)).logits[:-1]
        with torch.no_grad():
            its = taught(ids[None]).logits[0, :-1]
        for mine, theirs, target in zip(own, its, targets, strict=True):
            if target == IGNORED:
                continue
            p = (theirs / temperature).softmax(-1)
            divergence = (p * (p.log() - (mine / temperature).softmax(-1).log())).sum() * temperature**2
            total = total + ratio * divergence - (1 - ratio) * mine.softmax(-1)[target].log()
            count += 1
    (total / count).backward()
    torch.testing.assert_close(loss, (total / count).detach())
    naive = {
        f"base_model.model.{name}.lora_{half}.default.weight": pair[i].grad
        for name, pair in lora.items()
        for i, half in enumerate("AB")
    }
    assert_same(gradients, naive, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"packing": True, "max_length": 24}, {"gradient_checkpointing": True}])
def test_packed_and_recomputed_rows_distil_like_plain_ones(options: dict[str, Any], teacher: Path) -> None:
    rows = [{"prompt": f"{n}+{m}=", "completion": str(n + m)} for n in range(3, 6) for m in range(8, 12)]
    (loss, gradients), (other, others) = (loss_of(trainer_of(rows, teacher, **o)) for o in (options, {}))
    torch.testing.assert_close(loss, other)
    assert_same(gradients, others, rtol=1e-4, atol=1e-6)


def test_several_completions_of_a_prompt_distil_like_separate_rows(teacher: Path) -> None:
    separate = [part for row in BRANCHED for part in data.separate(row)]
    (loss, gradients), (other, others) = (loss_of(trainer_of(rows, teacher)) for rows in (BRANCHED, separate))
    torch.testing.assert_close(loss, other)
    assert_same(gradients, others, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["gemma3_text", "granite", "qwen3"])
def test_a_teacher_predicts_at_chosen_positions_what_it_predicts_everywhere(family: str, tmp_path: Path) -> None:
    """Where logits are scaled or capped behind the head, and windows slide."""
    folder = save_teacher(tmp_path / "teacher", tiny(family))
    ids = torch.arange(4, 24).repeat(2, 1)
    rows = torch.tensor([[3, 9, 19], [0, 1, 12]])
    with torch.no_grad():
        every = adapter.load(tiny(family), folder, verify=False)(ids).logits
    chosen = Teacher(tiny(family), folder).logits(Batch.of(ids, ids), rows)
    torch.testing.assert_close(chosen, every.gather(1, rows[..., None].expand(-1, -1, every.shape[-1])))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergences_are_trls(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 30, generator=generator) * 3 for _ in range(2))
    targets = torch.tensor([[1, 2, 3, 4, IGNORED], [7, IGNORED, IGNORED, IGNORED, IGNORED]])
    divergence, _ = distillation.losses(student, teacher, targets, beta=beta, temperature=1.7)
    wanted = GKDTrainer.generalized_jsd_loss(student, teacher, targets, beta=beta, temperature=1.7, reduction="sum")
    torch.testing.assert_close(divergence, wanted * 1.7**2)


# ------------------------------------------------------------------------------- the student's own answers


def test_a_cold_student_says_what_a_context_generates(base: Path, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "own")
    model = adapter.load(tiny(), folder, "own")
    tokenizer = tiny_tokenizer()
    asked = [tokenizer(text).input_ids for text in ("one:", "what is it, please?", "x")]
    answers = own_answers.sample(
        TwoStreams(model), "own", asked, ends={tokenizer.eos_token_id, 9}, max_new_tokens=12, temperature=1e-4,
        generator=torch.Generator(),
    )  # fmt: skip
    team = Specialists.load(str(base), {"own": folder})
    for prompt, answer in zip(asked, answers, strict=True):
        wanted = team.context().append(prompt).generate("own", max_new_tokens=12).token_ids
        end = next((i for i, token in enumerate(wanted) if token == 9), len(wanted))
        assert answer == wanted[: end + 1]


def test_batches_of_the_student_hold_its_answers_and_are_counted_by_them(teacher: Path) -> None:
    trainer = trainer_of(ROWS, teacher, lmbda=1.0, max_completion_length=7, max_length=20, kd_ratio=0.25)
    (given,) = trainer.get_train_dataloader()
    (batch,), count = trainer.get_batch_samples(iter([given]), 1, torch.device("cpu"))
    (again,), _ = trainer.get_batch_samples(iter([given]), 1, torch.device("cpu"))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    lengths = []
    for own, ids, labels in zip(given["labels"], batch["input_ids"], batch["labels"], strict=True):
        prompt = int((own != IGNORED).nonzero()[0])
        said = labels[prompt:][labels[prompt:] != IGNORED]
        lengths.append(len(said))
        assert (labels[:prompt] == IGNORED).all()
        assert torch.equal(ids[:prompt], given["input_ids"][lengths.index(lengths[-1], len(lengths) - 1)][:prompt])
        assert torch.equal(ids[prompt : prompt + len(said)], said)
        assert prompt + len(said) <= 20
    assert count == sum(lengths)
    assert max(lengths) == 7

    loss = trainer.compute_loss(trainer.model, batch)
    streams = TwoStreams(trainer.model)
    own = Batch.of(batch["input_ids"], batch["labels"], batch["attention_mask"])
    logits, targets, rows = streams.predictions(own)
    divergence, _ = distillation.losses(logits, trainer.teacher.logits(own, rows), targets)
    torch.testing.assert_close(loss, divergence / count)  # there are no labels, so kd_ratio does not count
    assert "ce_loss" not in trainer._metrics["train"]


def test_the_prompt_is_what_stands_before_the_last_answer() -> None:
    n = IGNORED
    labels = torch.tensor([[n, n, 7, 8, n, n, 3, 4, n], [n, 5, 6, n, n, n, n, n, n]])
    ids = torch.arange(18).view(2, 9)
    mask = torch.tensor([[1] * 9, [1] * 3 + [0] * 6])
    assert own_answers.prompts(labels, ids, mask) == [[0, 1, 2, 3, 4, 5], [9]]


# --------------------------------------------------------------------------------- the whole way


Distil = Callable[..., dict[str, Any]]


@pytest.fixture
def distil(base: Path, teacher: Path, tmp_path: Path) -> Distil:
    """Run ``icarus distill`` in process; the adapter lands in ``tmp_path/out`` unless told otherwise."""

    def run(rows: list[dict[str, Any]] = ROWS, **options: Any) -> dict[str, Any]:
        named = {"base": str(base), "data": str(save_rows(tmp_path / "data.jsonl", *rows)), "rank": 4}
        named |= {"output": str(tmp_path / "out"), "teacher": str(teacher), "dtype": "float32"}
        named |= {k: options.pop(k) for k in [*options] if k in DistillConfig.__dataclass_fields__}
        return command.train(DistillConfig(**named), IcarusDistillationConfig(**DEFAULTS | options))

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / adapter.WEIGHTS_NAME)


def test_a_student_comes_close_to_its_teacher_and_base_and_teacher_stay_as_they_were(
    distil: Distil, base: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(base), contents(teacher)
    trainers: list[Any] = []
    make = command._trainer
    monkeypatch.setattr(command, "_trainer", lambda *args: trainers.append(make(*args)) or trainers[-1])
    report = distil(
        kd_ratio=1.0, num_train_epochs=60, per_device_train_batch_size=3, learning_rate=2e-2, rank=16,
        eval_data=str(save_rows(tmp_path / "eval.jsonl", *ROWS)),
    )  # fmt: skip
    history = [entry for entry in trainers[0].state.log_history if "kd_loss" in entry]
    assert history[0]["loss"] == pytest.approx(history[0]["kd_loss"], rel=1e-4)
    assert history[-1]["kd_loss"] < 0.1 * history[0]["kd_loss"]
    assert history[-1]["ce_loss"] > 1  # what the labels say is another thing
    assert report["method"] == "distill"
    assert {"eval_kd_loss", "eval_ce_loss"} <= report["metrics"].keys()

    student, taught = (m.get_base_model() for m in (trainers[0].model, trainers[0].teacher.model))
    plain = tiny().state_dict()
    for model in (student, taught):
        state = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if ".lora_" not in k}
        assert_same(state, plain, **EXACT)
    assert_same(
        {k: v for k, v in taught.state_dict().items() if ".lora_" in k},
        {
            k: v
            for k, v in adapter.load(tiny(), teacher, "teacher", verify=False).get_base_model().state_dict().items()
            if ".lora_" in k
        },
        **EXACT,
    )
    assert (contents(base), contents(teacher)) == before

    adapter.verify(tmp_path / "out", base)
    prompt = ROWS[0]["prompt"]
    said = (
        Specialists.load(str(base), {"es": tmp_path / "out"}).context().append(prompt).generate("es", max_new_tokens=3)
    )
    ids = tiny_tokenizer()(prompt, return_tensors="pt").input_ids
    own = adapter.load(tiny(), teacher, verify=False)
    assert said.token_ids[:1] == own(ids).logits[0, -1:].argmax(-1).tolist()


def test_base_weights_are_in_memory_once(teacher: Path) -> None:
    trainer = trainer_of(ROWS, teacher)
    places = {
        name.replace(".base_layer", ""): parameter.data_ptr()
        for name, parameter in trainer.model.get_base_model().named_parameters()
        if ".lora_" not in name
    }
    own = trainer.teacher.model.get_base_model()
    theirs = {n.replace(".base_layer", ""): p for n, p in own.named_parameters() if ".lora_" not in n}
    assert {name: parameter.data_ptr() for name, parameter in theirs.items()} == places
    assert not any(parameter.requires_grad for parameter in trainer.teacher.model.parameters())
    assert adapter.names(trainer.model) == ["default"]


class _StoppedError(RuntimeError):
    pass


@pytest.mark.parametrize("lmbda", [0.0, 0.5])
def test_an_interrupted_distillation_resumes_to_the_same_adapter(
    lmbda: float, distil: Distil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: dict[str, Any] = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2,
        "per_device_train_batch_size": 2, "dropout": 0.2, "lmbda": lmbda, "max_completion_length": 5,
    }  # fmt: skip
    distil(output=str(tmp_path / "straight"), **steps)
    step_end = Progress.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step_end(self, args, state, control, **kwargs)
        if state.global_step == 5:
            raise _StoppedError

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "on_step_end", stop)
        with pytest.raises(_StoppedError):
            distil(**steps)
    assert not (tmp_path / "out").exists()
    assert distil(resume=True, **steps)["steps"] == 6
    assert_same(weights(tmp_path / "out"), weights(tmp_path / "straight"), **EXACT)


def test_the_command(base: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {base}\nteacher: {teacher}\nkd_ratio: 0.25\nrank: 2\nuse_cpu: true\ndtype: float32\n")
    rows, output = save_rows(tmp_path / "data.jsonl", *ROWS), tmp_path / "out"
    words = ["distill", "--config", str(recipe), "--data", str(rows), "--output", str(output), "--max_steps", "1"]
    assert cli.main([*words, "--kd_ratio", "0.75", "--logging_steps", "1", "--json", "-"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["steps"] == 1
    assert "step 1/1: loss" in printed.err
    assert "kd_loss" in printed.err
    assert adapter.verify(output, base).rank == 2
    assert DISTILL.parse(words[1:])[1].kd_ratio == 0.25


# ------------------------------------------------------------------------------------------ refusals


def test_what_cannot_be_used_is_named_in_one_sentence(distil: Distil, base: Path, tmp_path: Path) -> None:
    small = save_teacher(tmp_path / "small", tiny(hidden_size=32))
    fewer = save_teacher(tmp_path / "fewer", tiny(num_hidden_layers=2))
    more = save_teacher(tmp_path / "more", tiny(num_hidden_layers=4))
    for options, error, words in (
        ({"teacher": str(save_adapter(tmp_path / "own"))}, InputError, r"own is an ICaRus adapter already; give"),
        ({"teacher": str(tmp_path / "none")}, AdapterError, r"Teacher .*none: there is no such directory; give"),
        ({"teacher": str(base)}, AdapterError, r"Teacher .*: adapter_config.json is missing; give"),
        ({"teacher": str(small)}, AdapterError, r"Teacher .*small is no adapter of this base model \(size mismatch"),
        ({"teacher": str(fewer)}, AdapterError, r"Teacher .*fewer is no adapter of .*lacks .*layers.2"),
        ({"teacher": str(more)}, AdapterError, r"Teacher .*more is no adapter of .*layers.3"),
        ({"rows": []}, DataError, r"data.jsonl has no rows; give"),
        ({"kd_ratio": 1.5}, InputError, r"kd_ratio must be from 0 to 1, not 1.5"),
        ({"beta": -0.5}, InputError, r"beta must be from 0 to 1, not -0.5"),
        ({"max_completion_length": 0}, InputError, r"max_completion_length must be a positive integer, not 0"),
        ({"lmbda": 0.5, "packing": True}, InputError, r"lmbda and packing cannot be combined"),
        ({"lmbda": 1.0, "rows": BRANCHED}, InputError, r"lmbda and several completions .* cannot be combined; give"),
        ({"temperature": 0.0}, InputError, r"temperature must be above 0, not 0.0"),
    ):
        with pytest.raises(error, match=words) as caught:
            distil(**options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="give args=IcarusDistillationConfig"):
        IcarusDistillationTrainer(tiny(), tmp_path / "none")
    with pytest.raises(InputError, match="required: --teacher"):
        DISTILL.parse(["--base", "b", "--data", "d", "--output", "o"])
    assert not (tmp_path / "out").exists()


def test_a_teacher_whose_base_model_has_another_name_is_warned_of(
    teacher: Path, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny()
    model.name_or_path = "owner/other"
    folder = save_teacher(tmp_path / "teacher", model)
    student = tiny()
    student.name_or_path = "owner/mine"
    with caplog.at_level(logging.WARNING):
        Teacher(student, teacher)
        assert not caplog.records
        Teacher(student, folder)
    assert "'owner/other', and this one is called 'owner/mine'. If they differ, " in caplog.text


def test_a_teacher_whose_base_model_is_at_hand_is_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The weights, which models of one shape differ in; another name alone does not matter."""
    model = tiny()
    model.name_or_path = str(save_base(tmp_path / "same"))
    folder = save_teacher(tmp_path / "teacher", model)
    student = tiny()
    student.name_or_path = "owner/mine"
    Teacher(student, folder)
    assert not caplog.records
    with torch.no_grad():
        next(student.parameters()).mul_(2)
    with pytest.raises(InputError, match=r"was trained on .*same, which has other weights than owner/mine; give that"):
        Teacher(student, folder)
    Teacher(student.half(), folder)  # float16 may round otherwise
    (tmp_path / "same" / "model.safetensors").unlink()
    Teacher(student.float(), folder)
    assert caplog.text.count("If they differ") == 2


def test_a_model_that_a_trainer_has_changed_cannot_be_run_twice(teacher: Path) -> None:
    """TRL replaces its forward by one that runs the student, whoever calls it."""
    trainer = trainer_of(ROWS, teacher)
    with pytest.raises(UnsupportedModelError, match=r"^forward of \S+ was replaced, .*; load it anew"):
        Teacher(trainer.model, teacher)
