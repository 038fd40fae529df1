"""TRL's SFTTrainer with the two-stream loss; everything else (schedules, logging, resume, Accelerate) is theirs."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainingArguments
from transformers.modeling_outputs import CausalLMOutput
from trl import SFTConfig, SFTTrainer

from icarus import adapter, base_model, model_length
from icarus.errors import InputError
from icarus.streams import IGNORED, Batch, TwoStreams
from icarus.train import data, fields, tokenizer

logger = logging.getLogger(__name__)

_WITHOUT_EFFECT = {
    **dict.fromkeys(
        ("formatting_func", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"),
        "has no effect on a decoder's training; leave it out",
    ),
    "quantization_config": "is not taken; load the model as you want it and give that",
}
"""Arguments of TRL's trainer, and why they are refused; those of its SFTConfig stand in ``fields``."""
_COLUMNS = ("input_ids", "labels", "position_ids", "branch_ids")


@dataclass(frozen=True)
class Collator:
    """Pads token rows on the right. Returns (B, T) tensors: the columns of ``data.tokenize`` and ``attention_mask``.

    T is a multiple of ``pad_to_multiple_of``. Positions start again in each document of rows that TRL has packed.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        padding = {"input_ids": self.pad_token_id, "labels": IGNORED, "position_ids": 0, "branch_ids": 0}
        columns = {name: [torch.tensor(e[name]) for e in examples] for name in _COLUMNS if name in examples[0]}
        columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
        if "seq_lengths" in examples[0]:
            columns["position_ids"] = [torch.cat([torch.arange(n) for n in e["seq_lengths"]]) for e in examples]
        return {name: self._padded(values, padding.get(name, 0)) for name, values in columns.items()}

    def _padded(self, rows: list[Tensor], value: int) -> Tensor:
        block = pad_sequence(rows, batch_first=True, padding_value=value)
        return pad(block, (0, -block.shape[1] % (self.pad_to_multiple_of or 1)), value=value)


class IcarusSFTTrainer(SFTTrainer):  # type: ignore[misc]
    """``trl.SFTTrainer`` that trains a decoder: takes the same data formats, and its arguments or refuses them by name.

    ``model`` may be a name, a Transformers causal LM or a PEFT model; without adapter it gets one by ``peft_config``
    (default: LoRA on every projection that does not feed K or V). Loss is the mean over tokens that carry loss:
    completions and assistant messages. Encoder rows run without gradient for all tokens, decoder rows where the loss
    is. ``save_model`` writes ICaRus adapter directories.

    Raises:
        UnsupportedModelError: the model, or an adapter on a projection that feeds K or V.
        InputError: an argument that would have no effect.
        DataError: a row, by its index.
    """

    def __init__(
        self,
        model: str | nn.Module,
        args: SFTConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if args is None or not isinstance(args, SFTConfig):
            args = _sft_config(args, model)
        fields.check(args, {"decoder", "by name"} if isinstance(model, str) else {"decoder"})
        for name, why in _WITHOUT_EFFECT.items():
            if kwargs.pop(name, None) is not None:
                raise InputError(f"{name} {why}.")
        if isinstance(model, str):
            model, its_tokenizer = base_model.load(model, device="cpu" if args.use_cpu else None)
            processing_class = processing_class or its_tokenizer
        adapted = _adapted(model, args, peft_config)
        self.adapter_name = str(adapted.active_adapter)
        TwoStreams(adapted).probe()  # refuses before any data is read
        self.base_fingerprint = adapter.fingerprint(adapted)  # now, as FSDP will spread the weights over processes
        self._config = adapted.get_base_model().config.get_text_config()
        self._prepare_model(adapted)
        if processing_class is None:
            processing_class = tokenizer.of_model(adapted, trust=args.trust_remote_code)
        tokenizer.change(processing_class, args)
        self._given = args
        self._ends: list[int] | None = tokenizer.ends(adapted, processing_class, args)
        args = fields.after_rows(args)
        args.router_aux_loss_coef = 0.0  # the router is the base model's
        if data_collator is None and not (args.packing or args.padding_free):
            data_collator = _collator(processing_class, args)  # TRL's drops position_ids and branch_ids
        super().__init__(adapted, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)

    def _prepare_model(self, model: nn.Module) -> None:
        """Called with the adapted model before TRL and Accelerate replace its functions."""

    def _reject_skip_prepare_without_labels(self, datasets: dict[str, Any], data_collator: Any) -> None:
        """TRL calls it with all data sets, before it prepares them or not."""
        for name, dataset in datasets.items() if self._skip_prepare_dataset else ():
            if isinstance(dataset, Dataset) and not {"input_ids", "labels"} <= dataset[0].keys():
                raise InputError(
                    f"dataset_kwargs={self._given.dataset_kwargs!r} needs rows with input_ids and labels, which the "
                    f"{name} data set does not have; leave it out."
                )
        super()._reject_skip_prepare_without_labels(datasets, data_collator)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any) -> Any:
        if isinstance(dataset, IterableDataset):
            raise InputError("Streaming data sets are not supported; load the data set, or a part of it, first.")
        args = copy(args)
        args.max_length = self._given.max_length
        if "input_ids" not in dataset.column_names:
            dataset = self._token_rows(dataset, processing_class, packing)
        elif "position_ids" not in dataset.column_names:  # the rows are not ours
            fields.check_tokens(self._given, dataset.column_names)
        self._check_length(dataset)
        if "position_ids" in dataset.column_names and not packing:
            # Our rows are cut already, by positions; TRL would cut by tokens, of which branches have more.
            args.max_length = None
        prepared: Dataset = super()._prepare_dataset(dataset, processing_class, args, packing, *rest)
        return prepared

    def _check_length(self, dataset: Dataset) -> None:
        """Refuse now what would be refused when its batch comes."""
        limit = model_length.steady_length(self._config)
        if limit and "position_ids" in dataset.column_names:
            longest = 1 + max((max(row, default=0) for row in dataset["position_ids"]), default=0)
            model_length.refuse_longer(longest, limit, self._config.model_type)

    def _token_rows(self, dataset: Dataset, processing_class: Any, packing: bool) -> Dataset:
        given = self._given
        if (packing or given.packing or given.padding_free) and "completions" in dataset.column_names:
            raise InputError(
                "Packing and several completions on one prompt cannot be combined; set packing=False and "
                "padding_free=False."
            )
        fields.check_form(given, next(data.rows_of(dataset), {}))
        tokens, left_out = data.token_rows(data.rows_of(dataset), processing_class, given.max_length, ends=self._ends)
        self._ends = None  # told once, for training and evaluation data
        if left_out:
            logger.warning("%d examples carry no loss token and were left out; %d remain.", left_out, len(tokens))
        return tokens

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*_COLUMNS, "seq_lengths"]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean cross-entropy of the decoder over tokens that carry loss, as Trainer wants it normalised."""
        batch = Batch.of(
            inputs["input_ids"],
            inputs["labels"],
            inputs.get("attention_mask"),
            inputs.get("position_ids"),
            inputs.get("branch_ids"),
        )
        total, logits, targets = self._summed_loss(model, batch, inputs)
        count = (targets != IGNORED).sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = total / count.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages, the count is already over all processes
        self._record(logits.detach(), targets, batch)
        if not return_outputs:
            return loss
        outputs: Any = CausalLMOutput
        return loss, outputs(loss=loss, logits=logits)

    def _summed_loss(
        self, model: nn.Module, batch: Batch, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss over the tokens that carry it (scalar), logits (B, R, V) and targets (B, R; -100 pads)."""
        return TwoStreams(model).loss(batch)

    @torch.no_grad()
    def _record(self, logits: Tensor, targets: Tensor, batch: Batch) -> None:
        """TRL's metrics ``mean_token_accuracy`` and ``num_tokens``, over the rows that carry loss."""
        mode = "train" if self.model.training else "eval"
        valid = targets != IGNORED
        counts = torch.stack(
            [(logits.argmax(-1) == targets)[valid].sum(), valid.sum(), (batch.document_ids >= 0).sum()]
        )
        right, wanted, tokens = self.accelerator.gather_for_metrics(counts[None]).sum(0).tolist()
        metrics: defaultdict[str, list[float]] = self._metrics[mode]
        metrics["mean_token_accuracy"].append(right / max(wanted, 1))
        if mode == "train":
            self._total_train_tokens += tokens
        metrics["num_tokens"] = [self._total_train_tokens]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter alone, as an ICaRus directory (checkpoints too); the tokenizer stays with the base model."""
        model = self.accelerator.unwrap_model(self.model)
        target = output_dir or self.args.output_dir
        options: dict[str, Any] = {"base_fingerprint": self.base_fingerprint, "state_dict": state_dict}
        adapter.save(model, target, name=self.adapter_name, **options)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The adapter directory has its own card."""


def _collator(codes: Any, args: SFTConfig) -> Collator:
    padding = codes.eos_token_id if codes.pad_token_id is None else codes.pad_token_id
    return Collator(padding, args.pad_to_multiple_of)


def _sft_config(args: TrainingArguments | None, model: Any) -> SFTConfig:
    """As TRL does without one of its own."""
    if args is None:
        name = model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", ""))
        return SFTConfig(f"{name.split('/')[-1]}-SFT")
    given: dict[str, Any] = args.to_dict()  # type: ignore[no-untyped-call]
    return SFTConfig(**given | {"hub_token": args.hub_token})  # which to_dict hides


def _adapted(model: Any, args: SFTConfig, peft_config: Any) -> Any:
    """The model with an adapter: its own, or a new one."""
    if not hasattr(model, "peft_config"):
        torch.manual_seed(args.seed)
        return adapter.attach(model, peft_config)
    if peft_config is not None:
        raise InputError("peft_config has no effect on a model that has an adapter; leave it out.")
    adapter.check_attached(model, str(model.active_adapter))
    return model
