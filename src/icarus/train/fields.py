"""What becomes of each field of ``trl.SFTConfig``: it works, it is refused by name, or it is passed on to Transformers.

Nothing is silently without effect. A field of a new version of TRL or Transformers stands in no list and fails a test;
each of ``WORKS`` has a test that sees its effect.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

from trl import SFTConfig

from icarus.errors import InputError

Where = Literal["everywhere", "decoder", "by name", "command"]
"""Where a value is refused: always, with the decoder's loss, beside a model's name, or in ``icarus train``."""


@dataclass(frozen=True)
class Refused:
    """Why a field cannot be set, and what to do instead, to stand behind ``name=value``."""

    why: str
    taken: tuple[Any, ...] = ()
    """Values that are taken, besides the default."""
    where: Where = "everywhere"


WORKS = frozenset(
    # SFTConfig's own
    "activation_offloading chat_template_path eos_token eval_packing max_length packing packing_strategy "
    "pad_to_multiple_of pad_token padding_free shuffle_dataset "
    # Transformers', where they touch rows or loss, or are acted on here
    "average_tokens_across_devices bf16 bf16_full_eval data_seed disable_tqdm gradient_accumulation_steps "
    "gradient_checkpointing gradient_checkpointing_kwargs learning_rate neftune_noise_alpha "
    "per_device_eval_batch_size per_device_train_batch_size remove_unused_columns seed train_sampling_strategy "
    "use_cpu".split()
)

REFUSED: Mapping[str, Refused] = {
    # rows
    "assistant_only_loss": Refused(
        "is not possible, as a chat's loss is on what the assistant says; give rows of 'text' for loss on every token",
        taken=(True,),
    ),
    "completion_only_loss": Refused(
        "is not possible, as a prompt carries no loss; give rows of 'text' for loss on every token", taken=(True,)
    ),
    "dataset_kwargs": Refused(
        "is not taken, as all rows are tokenized here; leave it out",
        taken=({}, {"skip_prepare_dataset": False}),
        where="command",
    ),
    "dataset_num_proc": Refused("has no effect, as rows are tokenized in one process; leave it out"),
    "dataset_text_field": Refused("is not taken; call the field of the data 'text'"),
    "truncation_mode": Refused("is not taken, as rows are cut at their end; shorten their beginnings in the data"),
    # loss
    "label_names": Refused("has no effect; call the column 'labels'", taken=(["labels"],)),
    "label_smoothing_factor": Refused("is not part of a decoder's loss; leave it out", where="decoder"),
    "loss_type": Refused("is not a decoder's loss; leave it out", where="decoder"),
    "parallelism_config": Refused(
        "would split the rows or layers that two streams share; leave it out, and use DistributedDataParallel or FSDP",
        where="decoder",
    ),
    "router_aux_loss_coef": Refused(
        "is not part of a decoder's loss, as the router stays as it is; leave it out", taken=(0.0,), where="decoder"
    ),
    "use_cache": Refused("has no effect on training; leave it out"),
    # metrics
    "batch_eval_metrics": Refused("is for compute_metrics, which is not taken; leave it out"),
    "include_for_metrics": Refused("is for compute_metrics, which is not taken; leave it out"),
    # the model
    "model_init_kwargs": Refused("is not taken; load the model as you want it and give that to IcarusSFTTrainer"),
    "trust_remote_code": Refused(
        "cannot be combined with a model's name; load the model and give that to IcarusSFTTrainer", where="by name"
    ),
    # what is not one command's work
    "do_predict": Refused("is not taken; give the adapter to icarus generate", where="command"),
    "output_dir": Refused("cannot be set; give --output instead", taken=("trainer_output",), where="command"),
    "push_to_hub": Refused("is not taken; upload the finished adapter with hf upload", where="command"),
    "resume_from_checkpoint": Refused("cannot be set; give --resume instead", where="command"),
}

PASSED_ON = frozenset(
    # steps and optimizer
    "num_train_epochs max_steps lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay "
    "adam_beta1 adam_beta2 adam_epsilon optim_target_modules max_grad_norm auto_find_batch_size "
    # numbers and kernels
    "fp16 fp16_full_eval tf32 full_determinism torch_compile torch_compile_backend torch_compile_mode use_liger_kernel "
    "liger_kernel_config torch_empty_cache_steps "
    # logs
    "logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter "
    "include_num_input_tokens_seen log_level log_level_replica report_to run_name project trackio_space_id "
    "trackio_bucket_id trackio_static_space_id skip_memory_metrics debug "
    # evaluation; what is for predictions acts in trainer.predict()
    "eval_strategy eval_steps eval_delay prediction_loss_only eval_on_start eval_do_concat_batches "
    "eval_use_gather_object eval_accumulation_steps load_best_model_at_end metric_for_best_model greater_is_better "
    # checkpoints and the Hub
    "save_only_model save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint "
    "ignore_data_skip restore_callback_states_from_checkpoint hub_token hub_private_repo hub_model_id hub_strategy "
    "hub_always_push hub_revision "
    # loading of batches, processes
    "accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory "
    "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order "
    "length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph "
    "ddp_backend ddp_timeout fsdp fsdp_config deepspeed local_rank "
    # for scripts around Trainer, as Transformers says
    "do_train do_eval".split()
)


def check(args: SFTConfig, where: Collection[Where]) -> None:
    """Refuse what has no effect here; a field's default asks for nothing.

    Raises:
        InputError: naming the field, its value and the remedy.
    """
    for field in fields(args):
        refused, value = REFUSED.get(field.name), getattr(args, field.name)
        if refused is None or refused.where not in {"everywhere", *where}:
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if value not in (default, *refused.taken):
            raise InputError(f"{field.name}={value!r} {refused.why}.")
    if args.activation_offloading and args.device.type == "cpu":
        raise InputError("activation_offloading=True needs a GPU, whose memory it spares; leave it out.")


def check_form(args: SFTConfig, row: Mapping[str, Any], source: str = "the data set") -> None:
    """Refuse a limit of the loss that means nothing for rows of this form.

    Raises:
        InputError: naming the field and the form that it is for.
    """
    if args.completion_only_loss and "prompt" not in row:
        raise InputError(
            f"completion_only_loss=True needs rows of 'prompt' and 'completion', which {source} does not have; "
            "leave it out."
        )
    if args.assistant_only_loss and not isinstance(row.get("prompt", row.get("messages")), list):
        raise InputError(
            f"assistant_only_loss=True needs rows of messages, which {source} does not have; leave it out."
        )


def after_rows(args: SFTConfig) -> SFTConfig:
    """The settings for TRL when tokenizer and rows are as they say, so that it does none of that again."""
    rest = copy(args)
    rest.chat_template_path = None  # TRL would resize the embeddings
    rest.assistant_only_loss = None  # TRL would want messages, and a template of its own list
    if rest.padding_free and not rest.packing:
        rest.max_length = None  # rows are cut already, which TRL does not know
    return rest


def check_tokens(args: SFTConfig, columns: Sequence[str]) -> None:
    """Refuse the same for rows of tokens, and a mask that nobody would read.

    Raises:
        InputError: naming the field and what it needs.
    """
    if args.assistant_only_loss:
        raise InputError("assistant_only_loss has no effect on rows of tokens, which have labels; leave it out.")
    masked = "completion_mask" in columns and "labels" not in columns
    if args.completion_only_loss and not masked:
        raise InputError(
            "completion_only_loss=True needs rows of tokens with completion_mask and without labels; leave it out."
        )
    if masked and not args.completion_only_loss:
        raise InputError("completion_mask acts with completion_only_loss=True alone; set it, or remove the column.")
