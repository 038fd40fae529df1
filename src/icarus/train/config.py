"""The settings of ``icarus train`` and ``icarus distill``: a pair of dataclasses each, behind flags and YAML.

``TrainConfig`` and ``DistillConfig`` are ours; ``IcarusSFTConfig`` is TRL's SFTConfig (so all of Transformers'
TrainingArguments: schedules, accumulation, precision, FSDP, ``report_to``) with the defaults that suit a decoder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from trl import SFTConfig, TrlParser

from icarus.arguments import Parser
from icarus.errors import InputError
from icarus.train import fields


@dataclass(kw_only=True)
class AdapterConfig:
    """What to train on what, and where the adapter goes."""

    base: str = field(metadata={"help": "base model: hub id, folder, or smollm2-135m-instruct (packaged)"})
    data: str = field(metadata={"help": "training data: a .jsonl file or a hub data set (owner/name[:split])"})
    output: str = field(metadata={"help": "adapter directory to write; checkpoints and logs go to OUTPUT.run"})
    eval_data: str | None = field(default=None, metadata={"help": "evaluation data, as --data"})
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
        for name, kind in get_type_hints(type(self)).items():  # a recipe's values, which argparse does not check
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

    @property
    def kind(self) -> Literal["icarus", "lora"]:
        """Of the adapter that is trained."""
        return "icarus"


@dataclass(kw_only=True)
class TrainConfig(AdapterConfig):
    """The settings of ``icarus train`` that are not TRL's."""

    method: Literal["icarus", "lora"] = field(
        default="icarus",
        metadata={"help": "icarus: a specialist that shares the cache; lora: the conventional baseline"},
    )

    @property
    def kind(self) -> Literal["icarus", "lora"]:
        """Of the adapter that is trained."""
        return self.method


@dataclass(kw_only=True)
class DistillConfig(AdapterConfig):
    """The settings of ``icarus distill`` that are not of ``IcarusDistillationConfig``."""

    teacher: str = field(metadata={"help": "conventional LoRA adapter of the base model: a folder or a hub id"})


@dataclass
class IcarusSFTConfig(SFTConfig):  # type: ignore[misc]
    """``trl.SFTConfig`` with a decoder's defaults."""

    output_dir: str | None = field(default=None, metadata={"help": "set from --output"})
    learning_rate: float = field(default=2e-3, metadata={"help": "peak learning rate"})
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


@dataclass
class IcarusDistillationConfig(IcarusSFTConfig):
    """``IcarusSFTConfig`` with what a student takes from its teacher; names are TRL's and torchtune's."""

    kd_ratio: float = field(
        default=0.5,
        metadata={
            "help": "share of the divergence from the teacher in the loss; the rest is the labels' cross-entropy"
        },
    )
    beta: float = field(
        default=0.0,
        metadata={"help": "0: KL(teacher || student), 1: KL(student || teacher), between: generalized Jensen-Shannon"},
    )
    temperature: float = field(
        default=1.0, metadata={"help": "of both distributions in the divergence, and of the student's sampling"}
    )
    lmbda: float = field(
        default=0.0, metadata={"help": "share of batches with answers that the student samples (on-policy)"}
    )
    max_completion_length: int = field(default=256, metadata={"help": "longest answer that the student samples"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kd_ratio", "beta", "lmbda"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be from 0 to 1, not {getattr(self, name)!r}.")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"temperature must be above 0, not {self.temperature!r}.")
        if type(self.max_completion_length) is not int or self.max_completion_length < 1:
            raise InputError(f"max_completion_length must be a positive integer, not {self.max_completion_length!r}.")
        if self.lmbda and (self.packing or self.padding_free):
            raise InputError(
                "lmbda and packing cannot be combined, as an answer is sampled for each row; leave one out."
            )


class _Parser(TrlParser, Parser):  # type: ignore[misc]
    """TRL's parser with our errors."""


@dataclass(frozen=True)
class Settings:
    """The two dataclasses behind the flags of a command."""

    command: str
    own: type[AdapterConfig]
    of_trainer: type[IcarusSFTConfig]
    description: str = ""
    """More for the beginning of ``--help``."""

    def help_text(self) -> str:
        """The text of ``--help``; flags that are always refused are left out."""
        parser = self._parser()
        for flag in parser._actions:
            refused = fields.REFUSED.get(flag.dest)
            if refused and refused.where != "decoder" and not refused.taken:
                flag.help = argparse.SUPPRESS
        return str(parser.format_help())

    def parse(self, arguments: Sequence[str]) -> tuple[Any, Any]:
        """Flags, and ``--config recipe.yaml`` for their defaults; flags win. Returns one of each dataclass.

        Raises:
            InputError: an unknown or missing setting, naming it.
        """
        words = [part for word in arguments for part in (word.split("=", 1) if _names_recipe(word) else [word])]
        if "--config" in words and not "".join(words[words.index("--config") + 1 :][:1]):
            raise InputError("--config needs the name of a YAML file.")
        try:
            own, of_trainer = self._parser().parse_args_and_config(words)
        except ValueError as error:
            raise InputError(str(error).split(" Please remove")[0].rstrip(".") + ".") from error
        except OSError as error:
            raise InputError(f"--config could not be read ({error}); name a YAML file of settings.") from error
        except yaml.YAMLError as error:
            raise InputError(f"--config is not YAML ({' '.join(str(error).split())}); correct the file.") from error
        return own, of_trainer

    def _parser(self) -> Any:
        parser: Any = _Parser  # whose constructor is TRL's
        return parser(
            (self.own, self.of_trainer),
            prog=self.command,
            usage=f"{self.command} [flags]",
            description=self.description or None,
            epilog="--config FILE has settings as YAML; flags win; --json FILE writes the figures as JSON (- prints "
            "them as the last line); --debug shows tracebacks.",
        )


def _names_recipe(word: str) -> bool:
    return word.startswith("--config=")


TRAIN = Settings(
    "icarus train",
    TrainConfig,
    IcarusSFTConfig,
    "Train one specialist with the flags below. Or prepare a base model for a team and train all of its specialists: "
    "icarus train --team FILE, without other flags (docs/train.md).",
)
DISTILL = Settings(
    "icarus distill",
    DistillConfig,
    IcarusDistillationConfig,
    "Train a specialist on the predictions of a conventional LoRA adapter of the same base model (docs/train.md).",
)
