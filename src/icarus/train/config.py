"""The settings of ``icarus train``: one pair of dataclasses behind flags and YAML.

``TrainConfig`` is ours; ``IcarusSFTConfig`` is TRL's SFTConfig (so all of Transformers' TrainingArguments: schedules,
accumulation, precision, FSDP, ``report_to``) with the defaults that suit a decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from trl import SFTConfig, TrlParser

from icarus.arguments import Parser
from icarus.errors import InputError

LEARNING_RATES = {"icarus": 2e-3, "lora": 1e-3}
"""Peak learning rate by method, where none is given."""


@dataclass(kw_only=True)
class TrainConfig:
    """What to train on what, and where the adapter goes."""

    base: str = field(metadata={"help": "base model: hub id, folder, or smollm2-135m-instruct (packaged)"})
    data: str = field(metadata={"help": "training data: a .jsonl file or a hub data set (owner/name[:split])"})
    output: str = field(metadata={"help": "adapter directory to write; checkpoints and logs go to OUTPUT.run"})
    eval_data: str | None = field(default=None, metadata={"help": "evaluation data, as --data"})
    method: Literal["icarus", "lora"] = field(
        default="icarus",
        metadata={"help": "icarus: a specialist that shares the cache; lora: the conventional baseline"},
    )
    rank: int = field(default=16, metadata={"help": "LoRA rank"})
    alpha: int | None = field(default=None, metadata={"help": "LoRA alpha (default: twice the rank)"})
    dropout: float = field(default=0.0, metadata={"help": "LoRA dropout"})
    targets: list[str] | None = field(
        default=None,
        metadata={"help": "projections to adapt (default: all linear ones; with icarus, without those of K and V)"},
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={
            "help": "dtype of the base weights in training (auto: bfloat16, but float32 on a CPU without instructions "
            "for it)"
        },
    )
    adapter_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "dtype of the adapter's tensors on disk"}
    )
    resume: bool = field(default=False, metadata={"help": "resume from the last checkpoint in OUTPUT.run"})

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(TrainConfig).items():  # a recipe's values, which argparse does not check
            value = getattr(self, name)
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise InputError(f"{name} must be one of {', '.join(get_args(kind))}, not {value!r}.")
        if type(self.rank) is not int or self.rank < 1:
            raise InputError(f"rank must be a positive integer, not {self.rank!r}.")
        if self.alpha is not None and (type(self.alpha) is not int or self.alpha < 1):
            raise InputError(f"alpha must be a positive integer, not {self.alpha!r}.")
        if isinstance(self.targets, str):
            raise InputError(f"targets must be a list of names, not {self.targets!r}.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be 0 or more and less than 1, not {self.dropout!r}.")


@dataclass
class IcarusSFTConfig(SFTConfig):  # type: ignore[misc]
    """``trl.SFTConfig`` with a decoder's defaults."""

    output_dir: str | None = field(default=None, metadata={"help": "set from --output"})
    learning_rate: float | None = field(
        default=None, metadata={"help": "peak learning rate (default: icarus 2e-3, lora 1e-3)"}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning-rate schedule"})
    warmup_steps: float = field(default=0.05, metadata={"help": "steps, or a fraction of all steps if below 1"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "recompute decoder rows to save memory"})
    bf16: bool = field(default=False, metadata={"help": "autocast on top of --dtype"})
    max_length: int | None = field(default=4096, metadata={"help": "longest example in tokens; the rest is cut off"})
    logging_steps: float = field(default=10, metadata={"help": "steps from one log line to the next"})
    # None first, as TRL has it: its parser takes the second type for the flag's, and cannot use list[str].
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="none", metadata={"help": "tensorboard, wandb, ... or none"}
    )
    assistant_only_loss: bool | None = field(
        default=None, metadata={"help": "refuse rows other than chats, whose loss is always on the assistant alone"}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints kept in OUTPUT.run"})


class _Parser(TrlParser, Parser):  # type: ignore[misc]
    """TRL's parser with our errors."""


def _parser() -> Any:
    parser: Any = _Parser  # whose constructor is TRL's
    return parser(
        (TrainConfig, IcarusSFTConfig),
        prog="icarus train",
        epilog="--config FILE has settings as YAML; flags win; --json FILE writes the figures as JSON (- prints "
        "them as the last line); --debug shows tracebacks.",
    )


def help_text() -> str:
    """The text of ``icarus train --help``."""
    return str(_parser().format_help())


def parse(arguments: Sequence[str]) -> tuple[TrainConfig, IcarusSFTConfig]:
    """Flags, and ``--config recipe.yaml`` for their defaults; flags win.

    Raises:
        InputError: an unknown or missing setting, naming it.
    """
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" in words and not "".join(words[words.index("--config") + 1 :][:1]):
        raise InputError("--config needs the name of a YAML file.")
    try:
        config, sft = _parser().parse_args_and_config(words)
    except ValueError as error:
        raise InputError(str(error).split(" Please remove")[0].rstrip(".") + ".") from error
    except OSError as error:
        raise InputError(f"--config could not be read ({error}); name a YAML file of settings.") from error
    except yaml.YAMLError as error:
        raise InputError(f"--config is not YAML ({' '.join(str(error).split())}); correct the file.") from error
    return config, sft
