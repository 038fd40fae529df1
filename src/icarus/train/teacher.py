"""The teacher of a distillation: a conventional adapter, as PEFT runs it, on the student's own base weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from icarus import adapter, packaged_model
from icarus.errors import AdapterError, InputError, UnsupportedModelError
from icarus.streams import Batch, TwoStreams

logger = logging.getLogger(__name__)


class Teacher:
    """A frozen conventional adapter on a second model whose base weights are the first one's, in memory once.

    Args:
        model: the student, or its base model.
        source: folder or Hub id of a conventional adapter of the same base model.

    Raises:
        InputError: the adapter is missing, an ICaRus adapter, or of another base model.
        UnsupportedModelError: the model has no output embeddings.
    """

    def __init__(self, model: nn.Module, source: str | Path) -> None:
        self.model = _loaded(model, source)
        self._base = self.model.get_base_model()
        if self._base.get_output_embeddings() is None:
            raise UnsupportedModelError(
                f"{type(self._base).__name__} has no output embeddings; take another base model."
            )
        self._streams = TwoStreams(self._base)  # for its masks

    @torch.no_grad()
    def logits(self, batch: Batch, rows: Tensor) -> Tensor:
        """What the teacher predicts at the positions ``rows`` (B, R) of a batch: (B, R, V).

        Logits of other positions are never computed, for with a long prompt they would take most of the memory.
        """

        def chosen(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, *rest = inputs
            return hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1])), *rest

        with self._base.get_output_embeddings().register_forward_pre_hook(chosen):
            return self.model(  # type: ignore[no-any-return]
                input_ids=batch.input_ids,
                attention_mask=self._streams.mask(batch),
                position_ids=batch.position_ids,
                use_cache=False,
            ).logits


def _loaded(model: nn.Module, source: str | Path) -> Any:
    folder = adapter.locate(source)
    if adapter.is_icarus(folder):
        raise InputError(f"Teacher {source} is an ICaRus adapter already; give a conventional LoRA, or serve it.")
    if not adapter.is_conventional(folder):
        raise AdapterError(f"Teacher {source}: {adapter.conventional_problems(folder)[0]}.")
    try:
        adapted: Any = adapter.load(adapter.twin(model), folder, "teacher", verify=False).eval()
    except AdapterError as error:
        raise AdapterError(
            f"Teacher {source} is no adapter of this base model ({_reason(error)}); give the base model that it was "
            "trained on."
        ) from error
    config = adapted.peft_config["teacher"]
    if config.is_prompt_learning:
        raise InputError(f"Teacher {source} is no LoRA but adds tokens to its prompts; give a LoRA.")
    _check_base(adapted, source, config.base_model_name_or_path)
    return adapted


def _check_base(adapted: Any, source: str | Path, its: str | None) -> None:
    """By name, as a conventional adapter has no fingerprint of its base model; by the weights, if that is a folder."""
    own = adapted.get_base_model().name_or_path
    if not its or not own or its == own:
        return
    packaged = {its, own} <= set(packaged_model.NAMES)
    same = False if packaged else _same_weights(adapted, Path(its))
    if same is False:
        raise InputError(
            f"Teacher {source} was trained on {its}, which has other weights than {own}; give that as the base model."
        )
    if same is None:
        logger.warning(
            "Teacher %s was trained on a base model called %r, and this one is called %r. If they differ, what it "
            "teaches is wrong: give the one that it was trained on.",
            source,
            its,
            own,
        )


def _same_weights(adapted: Any, folder: Path) -> bool | None:
    """Whether they are those in a folder; None where that cannot be told."""
    base = adapted.get_base_model()
    comparable = base.dtype in (torch.float32, torch.bfloat16) and not getattr(base, "is_quantized", False)
    if not comparable or not folder.is_absolute() or not (folder / "config.json").is_file():
        return None
    try:
        return bool(adapter.fingerprint(folder) == adapter.fingerprint(adapted))
    except InputError:
        return None


def _reason(error: AdapterError) -> str:
    """PEFT lists all misfits, a line each, below a headline."""
    lines = str(error).splitlines()
    return lines[min(1, len(lines) - 1)].strip(" \t.")
