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
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer
from transformers.modeling_outputs import CausalLMOutput
from trl import SFTConfig, SFTTrainer

from icarus import adapter, base_model
from icarus.errors import InputError, first_line
from icarus.streams import IGNORED, Batch, TwoStreams
from icarus.train import data
from icarus.train.config import LEARNING_RATES

logger = logging.getLogger(__name__)

# Settings of TRL that this loss and these rows would silently ignore, and the values that ask for nothing.
_WITHOUT_EFFECT = {
    "label_smoothing_factor": (0.0,),
    "loss_type": ("nll",),
    "completion_only_loss": (None, True),
    "truncation_mode": ("keep_start",),
    "dataset_text_field": ("text",),
}
_FUNCTIONS_WITHOUT_EFFECT = (
    "formatting_func",
    "compute_loss_func",
    "compute_metrics",
    "preprocess_logits_for_metrics",
)
_COLUMNS = ("input_ids", "labels", "position_ids", "branch_ids")


@dataclass(frozen=True)
class Collator:
    """Pads token rows on the right. Returns (B, T) tensors: the columns of ``data.tokenize`` and ``attention_mask``."""

    pad_token_id: int

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        padding = {"input_ids": self.pad_token_id, "labels": IGNORED, "position_ids": 0, "branch_ids": 0}
        columns = {name: [torch.tensor(e[name]) for e in examples] for name in _COLUMNS if name in examples[0]}
        columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
        return {n: pad_sequence(v, batch_first=True, padding_value=padding.get(n, 0)) for n, v in columns.items()}


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
        for name, values in _WITHOUT_EFFECT.items():
            if (value := getattr(args, name, values[0])) not in values:
                raise InputError(f"{name}={value!r} has no effect on a decoder's training; leave it out.")
        for name in _FUNCTIONS_WITHOUT_EFFECT:
            if kwargs.get(name) is not None:
                raise InputError(f"{name} has no effect on a decoder's training; leave it out.")
        if args is not None and args.learning_rate is None:  # an IcarusSFTConfig
            args.learning_rate = LEARNING_RATES["icarus"]
        if isinstance(model, str):
            for name in ("model_init_kwargs", "trust_remote_code", "quantization_config"):
                if getattr(args, name, None) or kwargs.get(name):
                    raise InputError(f"{name} is not taken beside a model's name; load the model and pass that.")
            model, tokenizer = base_model.load(model)
            processing_class = processing_class or tokenizer
        if not hasattr(model, "peft_config"):
            torch.manual_seed(args.seed if args else 42)
            model = adapter.attach(model, peft_config)
        elif peft_config is not None:
            raise InputError("peft_config has no effect on a model that has an adapter; leave it out.")
        else:
            adapter.check_attached(model, str(model.active_adapter))
        self.adapter_name = str(model.active_adapter)
        TwoStreams(model).probe()  # refuses before any data is read
        self.base_fingerprint = adapter.fingerprint(model)  # now, as FSDP will spread the weights over processes
        packed = bool(args and (args.packing or args.padding_free))
        if processing_class is None:
            processing_class = _tokenizer_of(model, trust=bool(getattr(args, "trust_remote_code", False)))
        if data_collator is None and not packed:  # TRL's drops position_ids and branch_ids
            pad = processing_class.pad_token_id
            data_collator = Collator(processing_class.eos_token_id if pad is None else pad)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any) -> Any:
        if isinstance(dataset, IterableDataset):
            raise InputError("Streaming data sets are not supported; load the data set, or a part of it, first.")
        if "input_ids" not in dataset.column_names:
            packed = packing or args.packing or args.padding_free
            if packed and "completions" in dataset.column_names:
                raise InputError(
                    "Packing and several completions on one prompt exclude each other; set packing=False and "
                    "padding_free=False."
                )
            dataset, left_out = data.token_rows(data.rows_of(dataset), processing_class, args.max_length)
            if left_out:
                logger.warning("%d examples carry no loss token and were left out; %d remain.", left_out, len(dataset))
        if "position_ids" in dataset.column_names and not packing:
            # Our rows are cut already, by positions; TRL would cut by tokens, of which branches have more.
            args = copy(args)
            args.max_length = None
        prepared: Dataset = super()._prepare_dataset(dataset, processing_class, args, packing, *rest)
        return prepared

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
        total, logits, targets = TwoStreams(model).loss(batch)
        count = (targets != IGNORED).sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = total / count.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages, the count is already over all processes
        self._record(logits.detach(), targets, batch)
        if not return_outputs:
            return loss
        outputs: Any = CausalLMOutput
        return loss, outputs(loss=loss, logits=logits)

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


def _tokenizer_of(model: Any, *, trust: bool) -> Any:
    """By the model's name, as TRL does."""
    name = str(getattr(model.config, "_name_or_path", None) or "")
    if not name:
        raise InputError("The model has no name by which to find its tokenizer; give processing_class.")
    try:
        source = base_model.resolve(name) if name == base_model.PACKAGED else name
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise InputError(
            f"The tokenizer of {name!r} could not be loaded ({first_line(error)}); give processing_class."
        ) from error
