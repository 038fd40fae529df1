"""lm-evaluation-harness with the model ``icarus``: a base model with or without an adapter of either kind.

    python -m icarus.evaluate.harness run --model icarus --model_args base=BASE,adapter=DIR --tasks hellaswag

The harness has no entry point for models, so this registers one and calls its command. The model is the harness's own
``hf`` but for the passes of an ICaRus adapter, so that numbers of all kinds are taken in the same way.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from icarus import packaged_model
from icarus.context import BASE
from icarus.errors import InputError
from icarus.evaluate.sides import Sides, TwoStream
from icarus.streams import EncoderCache

_ADAPTER = "evaluated"  # its name in the model
_OTHERS = ("pretrained", "tokenizer", "peft", "delta", "parallelize", "tp_plan", "backend")


@register_model("icarus")
class IcarusLM(HFLM):  # type: ignore[misc]
    """The model class ``icarus`` of lm-evaluation-harness.

    Args:
        base: Hub id, folder, or the packaged base model.
        adapter: folder or Hub id of an adapter of either kind; without one it is the base model.
        dtype: as ``icarus.base_model.load`` has it.
        device: default: CUDA if there is one, else the CPU.
        options: further arguments of lm-eval's ``hf``, but for those that name or place a model.

    Raises:
        InputError: the base model, the adapter or an argument cannot be used.
    """

    def __init__(
        self,
        base: str = packaged_model.PACKAGED,
        adapter: str | None = None,
        *,
        dtype: str = "auto",
        device: str | None = None,
        **options: Any,
    ) -> None:
        if refused := [name for name in _OTHERS if options.get(name) is not None]:
            raise InputError(f"The model icarus takes no {refused[0]}; name the model with base and adapter.")
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            device = None  # the harness's default, on which its own class does not insist either
        sides = Sides.load(base, {} if adapter is None else {_ADAPTER: adapter}, dtype=dtype, device=device)
        self._attached = ExitStack()  # open as long as the model is
        self.side = self._attached.enter_context(sides.side(BASE if adapter is None else _ADAPTER))
        if options.get("max_length") is None:
            options["max_length"] = self.side.max_length  # of all kinds; None lets the harness find it
        super().__init__(pretrained=self.side.causal_lm, tokenizer=sides.codec.tokenizer, **options)
        self.pretrained = base  # what reports name

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        """Logits (B, T, V) of rows that are padded on the right, if at all."""
        if not isinstance(self.side, TwoStream):
            logits: Tensor = super()._model_call(inps, attn_mask, labels)
            return logits
        cache = EncoderCache()
        self.side.streams.encode(inps, cache)
        return self.side.streams.decode(inps, cache, self.side.name)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        if isinstance(self.side, TwoStream):
            if options.get("do_sample") or (options.get("num_beams") or 1) > 1:
                raise InputError("The model icarus generates greedily; set do_sample=false and one beam.")
            options |= self.side.generation(options["attention_mask"])
        with torch.no_grad():
            tokens: Tensor = super()._model_generate(context, max_length, stop, **options)
        return tokens


if __name__ == "__main__":
    cli_evaluate()
