"""``icarus train``: from a base model and a data file to an adapter directory.

The adapter appears at ``output`` in one step when it is complete; checkpoints and logs live in ``output.run``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback
from trl import SFTTrainer

from icarus import adapter, arguments, base_model, memory, model_folder, processor
from icarus.errors import InputError
from icarus.train import data, fields, tokenizer
from icarus.train.config import TRAIN, AdapterConfig, DistillConfig, IcarusSFTConfig, TrainConfig
from icarus.train.distillation import IcarusDistillationTrainer
from icarus.train.fit import fit
from icarus.train.progress import Progress
from icarus.train.resume import check_same
from icarus.train.trainer import IcarusSFTTrainer


def add_arguments(parser: arguments.Parser) -> None:
    """``--json``; all other flags are those of the dataclasses in ``icarus.train.config``, which TRL's parser reads."""
    arguments.add_json(parser)
    parser.pass_on(help=TRAIN.help_text)


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    """Train, and return what was done as the report; of several processes, the first one alone."""
    if file := _team_file(options.rest):
        from icarus.train import team  # which imports this module

        return team.run(file)
    return report(train(*TRAIN.parse(options.rest)))


def _team_file(words: Sequence[str]) -> Path | None:
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--team=") else [word])]
    if "--team" not in words:
        return None
    if words in (["--team"], ["--team", ""]):
        raise InputError("--team needs the name of a team's YAML file: icarus train --team FILE.")
    if len(words) != 2 or words[0] != "--team" or not words[1]:
        raise InputError("--team FILE stands alone, as all settings of a team are in its YAML file.")
    return Path(words[1])


def report(figures: dict[str, Any]) -> dict[str, Any] | None:
    """Say on the terminal what was done; returns the figures in the first of several processes alone."""
    if os.environ.get("RANK", "0") != "0":  # torchrun started several processes
        return None
    steps, metrics = figures["steps"], figures["metrics"]
    loss = f", mean loss {metrics['train_loss']:.3f}" if "train_loss" in metrics else ""
    done = f"{steps} step{'' if steps == 1 else 's'} in {figures['seconds']} s{loss}"
    print(f"{figures['output']}: {done}", file=sys.stderr)
    return figures


def train(config: AdapterConfig, sft: IcarusSFTConfig) -> dict[str, Any]:
    """Train one adapter; returns what was done: paths, counts, seconds and the trainer's metrics.

    Raises:
        InputError: settings, data or model cannot be used; nothing was trained or written.
    """
    started = time.perf_counter()
    check(config, sft)
    output = Path(config.output).expanduser()
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file, and an adapter is a directory; choose another --output.")
    checkpoint = _checkpoint(output, config.resume)
    if sft.use_cpu or not torch.cuda.is_available():
        memory.keep()
    rows = data.read(config.data)
    eval_rows = data.read(config.eval_data) if config.eval_data else None
    model, codes = base_model.load(
        config.base, dtype=_dtype(config, use_cpu=sft.use_cpu), device="cpu" if sft.use_cpu else None
    )
    tokenizer.change(codes, sft)
    sft = copy(sft)
    sft.output_dir = str(run_directory(output))
    sft.dataloader_pin_memory &= torch.cuda.is_available()  # or torch warns at every start
    ends = tokenizer.ends(model, codes, sft)
    train_rows, left_out = _token_rows(rows, codes, sft, config, config.data, ends)
    eval_tokens = _token_rows(eval_rows, codes, sft, config, str(config.eval_data))[0] if eval_rows else None
    trainer = _trainer(config, fields.after_rows(sft), model, codes, train_rows, eval_tokens)
    if checkpoint:
        check_same(Path(checkpoint), config, getattr(trainer, "base_fingerprint", None))
    metrics = fit(trainer, checkpoint)
    _write(trainer, config, output)  # before evaluation, which may round the weights (bf16_full_eval)
    if eval_tokens is not None:
        metrics |= trainer.evaluate()
    return {
        "output": str(output),
        "method": config.method if isinstance(config, TrainConfig) else "distill",
        "examples": len(train_rows),
        "left_out": left_out,
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - started, 1),
        "metrics": metrics,
    }


def check(config: AdapterConfig, sft: IcarusSFTConfig) -> None:
    """Refuse settings that cannot be used together, before anything is read.

    Raises:
        InputError: naming them.
    """
    fields.check(sft, {"command", "by name"} if config.kind == "lora" else {"command", "by name", "decoder"})
    if sft.do_eval and not config.eval_data:  # eval_strategy sets it
        raise InputError("eval_strategy and do_eval need data; give --eval_data.")
    if config.kind == "lora" and sft.eval_packing and not sft.packing:
        raise InputError(
            "eval_packing without packing is wrong in TRL, where packed examples then see one another; leave it out."
        )


def _dtype(config: AdapterConfig, *, use_cpu: bool) -> str:
    """That of the base weights; on a CPU the processor decides, and the choice is said."""
    if config.dtype != "auto":
        return config.dtype
    if torch.cuda.is_available() and not use_cpu:
        return "bfloat16"
    count = model_folder.parameters(base_model.folder(config.base))
    if count is None:
        return "float32"
    choice = processor.choose(count)
    if os.environ.get("RANK", "0") == "0":
        print(f"Base weights in {choice.dtype}, {choice.reason}; --dtype says otherwise.", file=sys.stderr)
    return choice.dtype


def run_directory(output: Path) -> Path:
    """Where the checkpoints and logs of an adapter's training are."""
    return output.with_name(output.name + ".run")


def last_checkpoint(output: Path) -> str | None:
    """The last complete one of an interrupted run that was to write ``output``."""
    # The file that is written last tells a complete checkpoint from one that was cut short.
    states = run_directory(output).glob("checkpoint-*/trainer_state.json")
    complete = sorted(states, key=lambda f: int(f.parent.name.split("-")[1]))
    return str(complete[-1].parent) if complete else None


def _checkpoint(output: Path, resume: bool) -> str | None:
    folder, last = run_directory(output), last_checkpoint(output)
    if last and not resume:
        raise InputError(
            f"{folder} holds checkpoints of an earlier run; resume it with --resume, or remove that folder."
        )
    if resume and not last:
        raise InputError(f"There is nothing to resume: {folder} holds no checkpoint; start without --resume.")
    return last


def _token_rows(
    rows: Any, codes: Any, sft: IcarusSFTConfig, config: AdapterConfig, source: str, ends: Sequence[int] | None = None
) -> tuple[Any, int]:
    fields.check_form(sft, rows[0], source)
    packed = sft.packing or sft.eval_packing or sft.padding_free
    if "completions" in rows[0] and (config.kind == "lora" or packed):
        if packed:
            raise InputError("Packing and several completions of one prompt cannot be combined; leave out --packing.")
        rows = [part for row in rows for part in data.separate(row)]
    tokens, left_out = data.token_rows(rows, codes, sft.max_length, source, ends)
    if left_out and sft.process_index == 0:
        print(f"{left_out} of {len(rows)} examples of {source} carry no loss token and were left out.", file=sys.stderr)
    return tokens, left_out


class _ConventionalTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's, but PEFT does not ask the Hub for the base model's vocabulary at each checkpoint."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        adapter.save_conventional(model, output_dir or self.args.output_dir, state_dict=state_dict)


def _trainer(config: AdapterConfig, sft: Any, model: Any, codes: Any, rows: Any, eval_rows: Any) -> SFTTrainer:
    torch.manual_seed(sft.seed)
    lora: dict[str, Any] = {"rank": config.rank, "alpha": config.alpha, "dropout": config.dropout}
    lora["targets"] = config.targets
    kind: Callable[..., SFTTrainer] = IcarusSFTTrainer
    if isinstance(config, DistillConfig):
        kind = partial(IcarusDistillationTrainer, teacher_model=config.teacher)
    if config.kind == "icarus":
        model = adapter.attach(model, **lora)
    else:
        kind, model = _ConventionalTrainer, adapter.attach_conventional(model, **lora)
        rows, eval_rows = (r and r.select_columns(["input_ids", "labels"]) for r in (rows, eval_rows))
    trainer = kind(model=model, args=sft, train_dataset=rows, eval_dataset=eval_rows, processing_class=codes)
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Progress())
    return trainer


def _write(trainer: SFTTrainer, config: AdapterConfig, output: Path) -> None:
    state = trainer.accelerator.get_state_dict(trainer.model)  # FSDP gathers, so every process takes part
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    options: dict[str, Any] = {"dtype": getattr(torch, config.adapter_dtype), "state_dict": state}
    if isinstance(trainer, IcarusSFTTrainer):
        adapter.save(model, output, base_fingerprint=trainer.base_fingerprint, **options)
    else:
        adapter.save_conventional(model, output, **options)
