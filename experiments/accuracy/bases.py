"""Base models that were prepared for a team of tasks, before decoders are trained on them.

    team        ordinary LoRA on the tasks' rows, merged
    together    one encoder adapter for all tasks and a decoder for each, trained at once, with gradients through K and
                V; the encoder adapter is merged, and the decoders are thrown away

Either way it is a base model of its own, whose cache all of the team's specialists share.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from experiments.accuracy import training
from experiments.accuracy.data import Row
from experiments.accuracy.settings import Arm, Settings
from icarus import adapter, base_model, model_folder
from icarus.streams import IGNORED, Batch, EncoderCache, TwoStreams, _EncoderPass
from icarus.train.data import token_rows
from icarus.train.run import run_directory
from icarus.train.trainer import Collator

ENCODER = "encoder"
_ROWS_AT_ONCE = 2


def merged(settings: Settings, rows: Path, adapter_folder: Path, target: Path) -> None:
    """Ordinary LoRA on a file of rows; the merged model lies at ``target`` when it is complete."""
    team, base = settings.team, str(base_model.folder(settings.base))
    shutil.rmtree(adapter_folder, ignore_errors=True)
    told = training.Training(
        arm=Arm(method="lora", rank=team.rank),
        base=base,
        output=adapter_folder,
        rows=rows,
        steps=team.steps,
        batch_size=settings.batch_size,
        rate=team.rate,
        seed=team.seed,
        recompute=training.device() == "cpu",  # long rows would need 20 GB
    )
    training.run(settings, told)
    model, tokenizer = base_model.load(base, dtype="float32", device="cpu")
    _save(adapter.merge(model, adapter_folder), tokenizer, target)
    shutil.rmtree(run_directory(adapter_folder), ignore_errors=True)


def together(settings: Settings, rows: Mapping[str, Sequence[Row]], target: Path) -> None:
    """Encoder and decoders at once, on rows by task, each batch of one task. Interrupted, it starts anew."""
    team = settings.team
    model, tokenizer = base_model.load(settings.base, dtype=settings.dtype)
    torch.manual_seed(team.seed)
    joint = Joint(model, list(rows), team.rank)
    peft = joint.model
    optimizer = torch.optim.AdamW(joint.parameters(), lr=team.rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(team.steps // 20, 1), team.steps)
    peft.train()
    for step, (task, parts) in enumerate(_batches(settings, rows, tokenizer, next(peft.parameters()).device), 1):
        loss = joint.backward(task, parts)
        torch.nn.utils.clip_grad_norm_(joint.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step == team.steps:
            print(f"{target.name}, step {step}/{team.steps}: {task}, loss {loss:.3f}", flush=True)
    for task in rows:
        peft.delete_adapter(task)
    peft.set_adapter(ENCODER)
    _save(peft.float().merge_and_unload(), tokenizer, target)


class Joint:
    """A base model with one encoder adapter, which also acts in the decoder stream, and a decoder for each task."""

    def __init__(self, model: Any, tasks: Sequence[str], rank: int) -> None:
        def lora(targets: Any) -> LoraConfig:
            return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")

        decoders = lora(adapter.decoder_targets(model))
        self.model: Any = get_peft_model(model, lora("all-linear"), adapter_name=ENCODER)
        for task in tasks:
            self.model.add_adapter(task, decoders)
        self.streams = _JointStreams(self.model)
        self._activate([ENCODER])

    def parameters(self) -> list[torch.nn.Parameter]:
        """Of all adapters."""
        return [parameter for name, parameter in self.model.named_parameters() if "lora_" in name]

    def backward(self, task: str, parts: Sequence[Batch]) -> float:
        """Add the gradients of one batch, which reach the encoder adapter through K and V, too.

        Returns the loss: the mean over its tokens that carry loss.
        """
        self.streams.before_decode = lambda: self._activate([ENCODER, task])
        count, mean = sum(int((part.labels[:, 1:] != IGNORED).sum()) for part in parts), 0.0
        for part in parts:
            self._activate([ENCODER])
            loss = self.streams.loss(part)[0] / count
            loss.backward()  # type: ignore[no-untyped-call]
            mean += float(loss.detach())
        return mean

    def _activate(self, names: list[str]) -> None:
        self.model.base_model.set_adapter(names)
        for parameter in self.parameters():  # PEFT freezes those that are not active
            parameter.requires_grad_(True)


class _JointStreams(TwoStreams):
    """Two streams whose encoder pass is trained, with the adapters that ``Joint`` has made active."""

    before_decode: Any = None

    def encode(self, input_ids: Tensor, cache: EncoderCache, **options: Any) -> Tensor:
        batch: Batch = options["batch"]
        view = _EncoderPass(cache, input_ids.shape[1])
        self.model(
            input_ids=input_ids,
            attention_mask=self.mask(batch),
            position_ids=batch.position_ids,
            past_key_values=view,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.length += input_ids.shape[1]
        return input_ids  # nobody reads logits

    def _decode(self, input_ids: Tensor, cache: EncoderCache, positions: Tensor, mask: Any) -> Tensor:
        self.before_decode()
        return super()._decode(input_ids, cache, positions, mask)


def _batches(
    settings: Settings, rows: Mapping[str, Sequence[Row]], tokenizer: Any, device: torch.device
) -> Iterator[tuple[str, list[Batch]]]:
    """A task and the rows of its next step: in parts, as a batch of long rows would need too much memory."""
    size, collate = settings.batch_size, Collator(0)
    tokens = {task: list(token_rows(own, tokenizer, None)[0]) for task, own in rows.items()}
    for step in range(settings.team.steps):
        task = list(rows)[step % len(rows)]
        start = step // len(rows) * size
        own = [tokens[task][(start + i) % len(tokens[task])] for i in range(size)]
        parts = [collate(own[first : first + _ROWS_AT_ONCE]) for first in range(0, size, _ROWS_AT_ONCE)]
        yield task, [Batch.of(**{name: values.to(device) for name, values in part.items()}) for part in parts]


def _save(model: Any, tokenizer: Any, target: Path) -> None:
    model_folder.save(model.to(torch.bfloat16), tokenizer, target)
