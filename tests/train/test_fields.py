"""Each field of SFTConfig works, is refused by name or is passed on to Transformers; those that work have an effect."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.sft_trainer
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, TrainingArguments
from trl import SFTConfig

from icarus import processor
from icarus.errors import InputError
from icarus.streams import Batch, EncoderCache, TwoStreams
from icarus.train import IcarusSFTTrainer, fields, progress
from icarus.train import run as command
from icarus.train.config import TRAIN, IcarusSFTConfig, TrainConfig
from icarus.train.progress import Progress
from saved import save_base, save_rows
from tiny_models import CHATML, tiny, tiny_tokenizer, with_adapters

TEXTS = [{"prompt": f"{n}+{m}=", "completion": str(n + m)} for n in range(3, 6) for m in (8, 9, 95)]
CHATS = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": said}]} for said in "ab"]
OTHER = "Other\n" + CHATML
QUIET = {"use_cpu": True, "save_strategy": "no", "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
NAMES = {field.name for field in dataclasses.fields(SFTConfig)}


def trainer_of(rows: list[dict[str, Any]] = TEXTS, *, model: Any = None, **options: Any) -> Any:
    held_out = options.pop("eval_rows", None)
    options = {"output_dir": "unused", "per_device_train_batch_size": len(rows), "max_length": 64} | QUIET | options
    return IcarusSFTTrainer(
        with_adapters(tiny(), ("default",)) if model is None else model,
        SFTConfig(**options),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(held_out) if held_out else None,
        processing_class=tiny_tokenizer(),
    )


def batch_of(trainer: Any) -> dict[str, Tensor]:
    return next(iter(trainer.get_train_dataloader()))


def loss_of(rows: list[dict[str, Any]] = TEXTS, **options: Any) -> float:
    """Of one batch, in a training step that changes nothing."""
    trainer = trainer_of(rows, **{"max_steps": 1, "learning_rate": 0.0} | options)
    return float(trainer.train().training_loss)


def texts(rows: Any) -> list[str]:
    return [tiny_tokenizer().decode(ids) for ids in rows["input_ids"]]


# ------------------------------------------------------------------------------------------- the lists


def test_every_field_stands_in_one_list_and_each_that_works_has_a_test() -> None:
    lists = [*fields.WORKS, *fields.REFUSED, *fields.PASSED_ON]
    assert len(lists) == len(set(lists))
    assert NAMES - set(lists) == set(), "say in train/fields.py what becomes of these fields, and try them"
    assert set(lists) - NAMES == set(), "no field of this version"
    elsewhere = Path(__file__).with_name("test_run.py").read_text(encoding="utf-8")
    assert all(f"def {test}(" in elsewhere for test in ELSEWHERE.values())
    assert SEEN | ELSEWHERE.keys() == fields.WORKS


def test_the_page_names_every_field_of_sftconfig_itself_and_all_that_are_refused() -> None:
    page = (Path(__file__).parents[2] / "docs" / "train.md").read_text(encoding="utf-8")
    own = NAMES - {field.name for field in dataclasses.fields(TrainingArguments)}
    assert not [name for name in own | fields.REFUSED.keys() if f"`{name}`" not in page]


ELSEWHERE = {
    "average_tokens_across_devices": "test_two_processes_train_like_one_with_the_double_batch",
    "gradient_accumulation_steps": "test_accumulated_steps_equal_one_big_batch",
    "gradient_checkpointing": "test_gradient_checkpointing_trains_the_same",
    "learning_rate": "test_each_method_has_the_learning_rate_and_a_given_one_wins",
    "packing": "test_packed_rows_train_like_separate_ones",
}
"""Fields of WORKS by their tests in test_run.py."""
SEEN: set[str] = set()


def sees(*names: str) -> Callable[[Any], Any]:
    """Marks a test that sees the effect of these fields."""
    SEEN.update(names)
    return lambda test: test


REFUSED: dict[str, list[Any]] = {
    "assistant_only_loss": [],  # of IcarusSFTConfig alone: SFTConfig's default is False
    "batch_eval_metrics": [True],
    "completion_only_loss": [False],
    "dataset_kwargs": [{"skip_prepare_dataset": True}],
    "dataset_num_proc": [2],
    "dataset_text_field": ["body"],
    "do_predict": [True],
    "include_for_metrics": [["inputs"]],
    "label_names": [["answers"]],
    "label_smoothing_factor": [0.1],
    "loss_type": ["dft"],
    "model_init_kwargs": [{"revision": "main"}],
    "output_dir": ["elsewhere"],
    "parallelism_config": [object()],
    "push_to_hub": [True],
    "resume_from_checkpoint": ["checkpoint-1"],
    "router_aux_loss_coef": [0.01],
    "truncation_mode": ["keep_end"],
    "trust_remote_code": [True],
    "use_cache": [True],
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_refused_is_named_with_a_remedy_and_its_default_is_taken(name: str) -> None:
    assert REFUSED.keys() == fields.REFUSED.keys()
    everywhere: set[fields.Where] = {"decoder", "by name", "command"}
    args = IcarusSFTConfig(**QUIET)
    fields.check(args, everywhere)
    for taken in fields.REFUSED[name].taken:
        setattr(args, name, taken)
        fields.check(args, everywhere)
    for value in REFUSED[name] or [False]:
        setattr(args, name, value)
        with pytest.raises(InputError, match=rf"^{name}=.*; .*\.$"):
            fields.check(args, everywhere)
        if (where := fields.REFUSED[name].where) != "everywhere":
            fields.check(args, everywhere - {where})


@pytest.mark.parametrize("method", ["icarus", "lora"])
def test_both_doors_ask_the_list(method: Any, tmp_path: Path) -> None:
    config = TrainConfig(base="nowhere", data="none.jsonl", output=str(tmp_path / "out"), method=method)
    for name, value in (
        ("dataset_num_proc", 2),
        ("output_dir", "x"),
        ("trust_remote_code", True),
        ("do_predict", True),
    ):
        with pytest.raises(InputError, match=f"^{name}="):
            command.train(config, IcarusSFTConfig(**QUIET | {name: value}))
    if method == "icarus":
        with pytest.raises(InputError, match=r"^loss_type="):
            command.train(config, IcarusSFTConfig(**QUIET, loss_type="dft"))
    with pytest.raises(InputError, match=r"^dataset_num_proc="):
        trainer_of(dataset_num_proc=2)
    with pytest.raises(InputError, match=r"^trust_remote_code="):
        trainer_of(model="owner/name", trust_remote_code=True)


def test_what_needs_something_else_says_so(tmp_path: Path) -> None:
    config = TrainConfig(base="nowhere", data="none.jsonl", output=str(tmp_path / "out"), method="lora")
    with pytest.raises(InputError, match=r"^eval_strategy .* --eval_data"):
        command.train(config, IcarusSFTConfig(**QUIET, eval_strategy="epoch"))
    config.eval_data = "none.jsonl"
    with pytest.raises(InputError, match=r"^eval_packing without packing"):
        command.train(config, IcarusSFTConfig(**QUIET, eval_packing=True))
    with pytest.raises(InputError, match=r"^activation_offloading=True needs a GPU"):
        trainer_of(activation_offloading=True)


# --------------------------------------------------------------------------- rows that depend on the tokenizer


@pytest.fixture(params=["command", "lora", "trainer"])
def rows_of(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The trainer's rows by each door: ``rows_of(rows, **settings)``."""
    if request.param == "trainer":
        return lambda rows, **options: trainer_of(rows, **options)
    trainers: list[Any] = []
    make = command._trainer
    monkeypatch.setattr(command, "_trainer", lambda *args: trainers.append(make(*args)) or trainers[-1])

    def run(rows: list[dict[str, Any]], **options: Any) -> Any:
        base = save_base(tmp_path / "base")
        method = "lora" if request.param == "lora" else "icarus"
        data = save_rows(tmp_path / "data.jsonl", *rows)
        named = {"base": str(base), "data": str(data), "output": str(tmp_path / "out"), "dtype": "float32"}
        config = TrainConfig(**named, method=method, rank=2)
        batch = {"max_steps": 1, "per_device_train_batch_size": len(rows), "max_length": 64}
        command.train(config, IcarusSFTConfig(**QUIET | batch | options))
        return trainers[-1]

    return run


@sees("chat_template_path")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_rows_are_rendered_with_the_given_chat_template(rows_of: Any, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "other.jinja"
    path.write_text(OTHER)
    if kind == "folder":
        path = tmp_path / "other"
        tiny_tokenizer(OTHER).save_pretrained(path)
    trainer = rows_of(CHATS, chat_template_path=str(path))
    assert {text.split("\n")[0] for text in texts(trainer.train_dataset)} == {"Other"}
    assert trainer.model.get_input_embeddings().weight.shape == tiny().get_input_embeddings().weight.shape


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("none.jinja", "cannot be read"),
        ("none", "no tokenizer with a chat template"),
        ("plain", "no tokenizer with a chat template"),
        ("foreign", r"needs '<\|turn\|>', which .* lacks; give a .jinja"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(name: str, why: str, tmp_path: Path) -> None:
    tiny_tokenizer(None).save_pretrained(tmp_path / "plain")
    foreign = tiny_tokenizer(CHATML.replace("im_start", "turn"))
    foreign.add_special_tokens({"extra_special_tokens": ["<|turn|>"]})
    foreign.save_pretrained(tmp_path / "foreign")
    with pytest.raises(InputError, match=f"^chat_template_path .*{why}"):
        trainer_of(CHATS, chat_template_path=str(tmp_path / name))


@sees("eos_token")
def test_rows_end_with_the_given_eos(rows_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert {t[-13:] for t in texts(rows_of(TEXTS, eos_token="<|endoftext|>").train_dataset)} == {"<|endoftext|>"}
    assert "eos_token '<|endoftext|>'" in caplog.text


def test_a_given_eos_wins_over_that_of_the_template_given(tmp_path: Path) -> None:
    other = tiny_tokenizer()
    other.eos_token = "<|endoftext|>"
    other.save_pretrained(tmp_path)
    for given, end in ((None, "<|endoftext|>"), ("<|im_end|>", "<|im_end|>")):
        rows = trainer_of(TEXTS, chat_template_path=str(tmp_path), eos_token=given).train_dataset
        assert {text.endswith(end) for text in texts(rows)} == {True}


@sees("pad_token")
@pytest.mark.filterwarnings("ignore:`pad_token` is deprecated:FutureWarning")
def test_batches_are_padded_with_the_given_token(rows_of: Any) -> None:
    batch = batch_of(rows_of(TEXTS, pad_token="<unk>"))
    padding = batch["input_ids"][batch["attention_mask"] == 0]
    assert set(padding.tolist()) == {tiny_tokenizer().convert_tokens_to_ids("<unk>")}


@pytest.mark.filterwarnings("ignore:`pad_token` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["eos_token", "pad_token"])
def test_a_token_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"^{name} '<none>' is not in this tokenizer's vocabulary; give"):
        trainer_of(**{name: "<none>"})


def test_assistant_only_loss_is_what_chats_have_and_refuses_other_rows(rows_of: Any) -> None:
    trainer = rows_of(CHATS, assistant_only_loss=True)
    labels = [[i for i in row if i != -100] for row in trainer.train_dataset["labels"]]
    assert [tiny_tokenizer().decode(ids) for ids in labels] == ["a<|im_end|>", "b<|im_end|>"]
    with pytest.raises(InputError, match=r"^assistant_only_loss=True needs rows of messages, which .* leave it out"):
        rows_of(TEXTS, assistant_only_loss=True)
    rows_of(TEXTS, completion_only_loss=True)
    with pytest.raises(InputError, match=r"^completion_only_loss=True needs rows of 'prompt'"):
        rows_of(CHATS, completion_only_loss=True)


def test_the_flag_assistant_only_loss_can_be_seen_as_false() -> None:
    _, sft = TRAIN.parse(["--base", "b", "--data", "d", "--output", "o", "--assistant_only_loss", "false"])
    with pytest.raises(InputError, match=r"^assistant_only_loss=False .* give rows of 'text'"):
        fields.check(sft, {"command"})


# ---------------------------------------------------------------------------------- rows, batches and loss


@sees("max_length")
def test_rows_are_cut(rows_of: Any) -> None:
    assert max(map(len, rows_of(TEXTS, max_length=6).train_dataset["input_ids"])) == 6


@sees("shuffle_dataset", "seed")
def test_rows_are_shuffled_by_the_seed(rows_of: Any) -> None:
    orders = [texts(rows_of(TEXTS, **o).train_dataset) for o in ({}, {"shuffle_dataset": True})]
    assert orders[0] == [row["prompt"] + row["completion"] + "<|im_end|>" for row in TEXTS]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    other = texts(rows_of(TEXTS, shuffle_dataset=True, seed=7).train_dataset)
    assert other != orders[1]


@sees("padding_free")
def test_without_padding_a_batch_is_one_row_and_rows_are_cut(rows_of: Any) -> None:
    trainer = rows_of(TEXTS, padding_free=True, max_length=6)
    assert batch_of(trainer)["input_ids"].shape == (1, sum(map(len, trainer.train_dataset["input_ids"])))
    assert max(map(len, trainer.train_dataset["input_ids"])) == 6


def test_without_padding_the_loss_is_the_same() -> None:
    assert loss_of(padding_free=True, max_length=None) == pytest.approx(loss_of())


@sees("pad_to_multiple_of")
def test_rows_are_padded_to_a_multiple(rows_of: Any) -> None:
    assert batch_of(rows_of(TEXTS, pad_to_multiple_of=16))["input_ids"].shape[1] == 16


def test_padding_to_a_multiple_does_not_change_the_loss() -> None:
    assert loss_of(pad_to_multiple_of=16) == pytest.approx(loss_of())


@sees("packing_strategy")
def test_rows_are_packed_as_asked() -> None:
    best_fit = trainer_of(packing=True, max_length=12).train_dataset
    wrapped = trainer_of(packing=True, packing_strategy="wrapped", max_length=12).train_dataset
    assert {*map(len, wrapped["input_ids"][:-1])} == {12}
    assert {*map(len, best_fit["input_ids"])} != {12}
    assert sum(map(len, wrapped["input_ids"])) == sum(map(len, best_fit["input_ids"]))


@sees("eval_packing", "per_device_eval_batch_size")
def test_evaluation_rows_are_packed_alone_or_not_and_do_not_see_one_another() -> None:
    losses = {}
    for packing, eval_packing in ((False, None), (False, True), (True, False)):
        trainer = trainer_of(
            packing=packing, eval_packing=eval_packing, max_length=24, eval_rows=TEXTS, per_device_eval_batch_size=3
        )
        held_out, rows = trainer.eval_dataset, trainer.train_dataset
        assert ("seq_lengths" in held_out.column_names, "seq_lengths" in rows.column_names) == (
            bool(eval_packing),
            packing,
        )
        batches = [*trainer.get_eval_dataloader()]
        assert len(batches) == -(-len(held_out) // 3)
        sums = [(TwoStreams(trainer.model).loss(_as_batch(batch)))[0] for batch in batches]
        losses[packing, eval_packing] = float(sum(s.detach() for s in sums))
    assert max(losses.values()) == pytest.approx(min(losses.values()))


def _as_batch(batch: dict[str, Tensor]) -> Batch:
    return Batch.of(batch["input_ids"], batch["labels"], batch.get("attention_mask"), batch.get("position_ids"))


@sees("per_device_train_batch_size", "train_sampling_strategy", "data_seed")
def test_batches_are_drawn_as_asked() -> None:
    def drawn(**options: Any) -> list[list[str]]:
        trainer = trainer_of(TEXTS * 8, per_device_train_batch_size=4, **options)
        return [texts(batch) for batch in trainer.get_train_dataloader()]

    def padding(batches: list[list[str]]) -> int:
        return sum(text.count("<|endoftext|>") for batch in batches for text in batch)

    plain = drawn()
    assert {*map(len, plain)} == {4}
    assert drawn(data_seed=1) == drawn(data_seed=1) != drawn(data_seed=2)
    assert [text[:3] for text in drawn(train_sampling_strategy="sequential")[0]] == ["3+8", "3+9", "3+9", "4+8"]
    assert padding(drawn(train_sampling_strategy="group_by_length")) < padding(plain) / 2


@sees("remove_unused_columns")
@pytest.mark.parametrize("removed", [True, False])
def test_a_collator_of_ones_own_gets_the_columns_asked_for(removed: bool) -> None:
    seen: set[str] = set()
    trainer = trainer_of(remove_unused_columns=removed)
    collate = trainer.data_collator
    trainer.data_collator = lambda examples: seen.update(examples[0]) or collate(examples)
    batch_of(trainer)
    assert ("line" in seen) is not removed


def test_rows_of_tokens_are_taken_as_they_are() -> None:
    rows = [{"input_ids": list(range(4, 14)), "labels": [-100] * 4 + list(range(8, 14))}]
    assert batch_of(trainer_of(rows, max_length=8))["input_ids"].shape == (1, 8)
    kept = trainer_of(rows, max_length=8, dataset_kwargs={"skip_prepare_dataset": True})
    assert batch_of(kept)["input_ids"].shape == (1, 10)
    with pytest.raises(InputError, match=r"^dataset_kwargs=.* needs rows with input_ids and labels, which the train"):
        trainer_of(TEXTS, dataset_kwargs={"skip_prepare_dataset": True})
    with pytest.raises(InputError, match=r"^assistant_only_loss has no effect on rows of tokens"):
        trainer_of(rows, assistant_only_loss=True)


def test_a_mask_of_rows_of_tokens_acts_or_is_refused() -> None:
    masked = [{"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]}]
    batch = batch_of(trainer_of(masked, completion_only_loss=True))
    assert batch["labels"].tolist() == [[-100, -100, 7, 8]]
    with pytest.raises(InputError, match=r"^completion_mask acts with completion_only_loss=True alone; set it"):
        trainer_of(masked)
    for rows in ([{"input_ids": [5, 6]}], [{**masked[0], "labels": [-100, -100, 7, 8]}]):
        with pytest.raises(InputError, match=r"^completion_only_loss=True needs rows of tokens with completion_mask"):
            trainer_of(rows, completion_only_loss=True)
    said = [{"input_ids": [5, 6, 7, 8], "assistant_masks": [0, 1, 0, 1]}]
    assert batch_of(trainer_of(said))["labels"].tolist() == [[-100, 6, -100, 8]]


@sees("bf16")
def test_bf16_is_autocast() -> None:
    exact, rounded = loss_of(), loss_of(bf16=True)
    assert exact != rounded
    assert exact == pytest.approx(rounded, rel=1e-2)


@sees("neftune_noise_alpha")
def test_noise_is_on_the_decoder_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[EncoderCache] = []
    encode = TwoStreams.encode

    def kept(self: TwoStreams, input_ids: Tensor, cache: EncoderCache, **options: Any) -> Tensor:
        if options["batch"].input_ids.shape[0] > 1:  # no probe
            caches.append(cache)
        return encode(self, input_ids, cache, **options)

    monkeypatch.setattr(TwoStreams, "encode", kept)
    assert abs(loss_of(neftune_noise_alpha=5.0) - loss_of()) > 1e-2
    for layer in range(3):
        for noisy, quiet in zip(caches[0].layer(layer), caches[1].layer(layer), strict=True):
            assert torch.equal(noisy, quiet)
    evaluated = {"eval_rows": TEXTS, "per_device_eval_batch_size": len(TEXTS)}
    trainer = trainer_of(neftune_noise_alpha=5.0, max_steps=1, learning_rate=0.0, **evaluated)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_of())


@sees("gradient_checkpointing_kwargs")
def test_checkpointing_takes_its_options() -> None:
    for reentrant in (True, False):
        options = {"use_reentrant": reentrant}
        trainer = trainer_of(
            gradient_checkpointing=True, gradient_checkpointing_kwargs=options, max_steps=1, learning_rate=0.0
        )
        assert trainer.train().training_loss == pytest.approx(loss_of())
        used = {
            part._gradient_checkpointing_func.keywords["use_reentrant"]
            for part in trainer.model.modules()
            if getattr(part, "gradient_checkpointing", False)
        }
        assert used == {reentrant}


@sees("activation_offloading")
def test_activations_of_the_decoder_are_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Tensor] = []

    def offloading(model: Any) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)

    monkeypatch.setattr(trl.trainer.sft_trainer, "get_act_offloading_ctx_manager", offloading)
    monkeypatch.setattr(fields, "check", lambda *_: None)  # which wants a GPU
    trainer_of(max_steps=1).train()
    assert not saved
    trainer_of(activation_offloading=True, max_steps=1).train()
    assert saved


def test_an_expert_model_is_trained_without_a_loss_of_its_router() -> None:
    model = with_adapters(tiny("qwen3_moe"), ("default",))
    trainer = trainer_of(model=model, max_steps=1)
    trainer.train()
    assert "aux_loss" not in trainer.state.log_history[0]
    assert not model.config.output_router_logits


@sees("bf16_full_eval")
def test_evaluation_in_half_precision_leaves_the_written_adapter_exact(tmp_path: Path) -> None:
    base, data = save_base(tmp_path / "base"), save_rows(tmp_path / "data.jsonl", *TEXTS)
    losses = []
    for half in (False, True):
        output = tmp_path / f"out{half}"
        named = {"base": str(base), "data": str(data), "eval_data": str(data), "output": str(output)}
        config = TrainConfig(**named, rank=2, dtype="float32")  # on every processor
        report = command.train(config, IcarusSFTConfig(**QUIET, max_steps=2, bf16_full_eval=half))
        losses.append(report["metrics"]["eval_loss"])
    assert losses[0] != losses[1]
    exact, other = (load_file(tmp_path / f"out{half}" / "adapter_model.safetensors") for half in (False, True))
    assert all(torch.equal(exact[name], other[name]) for name in exact)


@sees("use_cpu")
def test_use_cpu_loads_there_in_the_dtype_of_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(processor, "slow_in_bfloat16", lambda: True)
    config = TrainConfig(base=str(save_base(tmp_path / "base")), data="", output="")
    assert command._dtype(config, use_cpu=True) == "float32"
    assert command._dtype(config, use_cpu=False) == "bfloat16"
    devices: list[Any] = []

    def load(name: str, **options: Any) -> Any:
        devices.append(options["device"])
        raise InputError("enough")

    monkeypatch.setattr(command.base_model, "load", load)
    with pytest.raises(InputError, match="enough"):
        trainer_of(model="owner/name")
    assert devices == ["cpu"]


@sees("disable_tqdm")
@pytest.mark.parametrize("disabled", [True, False])
def test_the_bar_can_be_turned_off(disabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    shown, trainer = Progress(), trainer_of(disable_tqdm=disabled)
    shown.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert shown.bar is not None
    assert bool(shown.bar.disable) is disabled
    shown.bar.close()


# ------------------------------------------------------------------------------------- other kinds of settings


def test_the_settings_given_stay_as_they_were() -> None:
    args = IcarusSFTConfig(**QUIET | {"output_dir": "unused", "padding_free": True, "assistant_only_loss": True})
    before = args.to_dict()
    model, dataset = with_adapters(tiny(), ("default",)), Dataset.from_list(CHATS)
    trainer = IcarusSFTTrainer(model, args, train_dataset=dataset, processing_class=tiny_tokenizer())
    assert args.to_dict() == before
    assert trainer.args.learning_rate == 2e-3


def test_transformers_own_arguments_do() -> None:
    args = TrainingArguments("unused", use_cpu=True, learning_rate=0.25, report_to="none")
    model, dataset = with_adapters(tiny(), ("default",)), Dataset.from_list(TEXTS)
    trainer = IcarusSFTTrainer(model, args, train_dataset=dataset, processing_class=tiny_tokenizer())
    assert isinstance(trainer.args, SFTConfig)
    assert trainer.args.learning_rate == 0.25


@pytest.mark.parametrize("trusted", [True, False])
def test_a_tokenizer_with_code_of_its_own_is_trusted_if_asked(trusted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def load(name: str, *, trust_remote_code: bool) -> Any:
        asked.append(trust_remote_code)
        return tiny_tokenizer()

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    model = with_adapters(tiny(), ("default",))
    model.config._name_or_path = "owner/name"
    args = SFTConfig("unused", trust_remote_code=trusted, **QUIET)
    IcarusSFTTrainer(model, args, train_dataset=Dataset.from_list(TEXTS))
    assert asked == [trusted]
