"""Further forms of a decoder: what else it may read of the encoder, or change. In process only.

A form adds small modules to the decoder stream, which starts as plain ICaRus does: all of them add zero at first. With
h^E and h^D the hidden states of the two streams and x^E, x^D the inputs of a projection:

    residual   h^D += s B A h^E behind each layer, as IBM's Shadow Residual has it
    inputs     W x^D + s B (A x^D + A' x^E) in each adapted projection
    norms      (1 + g) norm(h^D) in each norm
    head       lm_head(h^D) + s B A h^D
    queries    further query heads that read the same K/V (query_heads.py)

What a module reads of the encoder is kept from the encoder pass, without gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.accuracy.query_heads import QueryHeads
from icarus.lora import unwrapped
from icarus.streams import Batch, EncoderCache, TwoStreams
from icarus.train import IcarusSFTTrainer

Form = Literal["residual", "inputs", "norms", "head", "queries"]

_READS = {"residual", "inputs"}
_EXTRAS = "form.pt"


class Extra(nn.Module):
    """What a form adds behind one module of the model."""

    def __init__(self, form: Form, module: Any, rank: int) -> None:
        super().__init__()
        self.form, self.scale = form, 2.0  # alpha is twice the rank, as LoRA here has it
        width, out = _sizes(form, module)
        self.up: Callable[[Tensor], Tensor] | None = None
        if form == "norms":
            self.gain = nn.Parameter(torch.zeros(width))
            self.norm = (module,)  # in a tuple, so that it is no part of this one
            return
        self.down = nn.Linear(width, rank, bias=False)
        if form == "inputs":  # B is that of the adapter
            self.up = next(iter(module.lora_B.values()))
        else:
            self.own_up = nn.Linear(rank, out, bias=False)
            self.own_up.weight.data.zero_()
            self.up = self.own_up

    def forward(self, output: Tensor, read: Tensor) -> Tensor:
        """The module's output in the decoder stream; ``read`` is what its form reads, (B, R, width)."""
        if self.form == "norms":
            (norm,) = self.norm  # anew, in float32: a small gain would be lost in an output in bfloat16
            weight = norm.weight.float() * (1 + self.gain)
            return F.rms_norm(read.float(), weight.shape, weight, norm.variance_epsilon).to(output.dtype)
        assert self.up is not None
        return output + (self.scale * self.up(self.down(read.float()))).to(output.dtype)


def _sizes(form: Form, module: Any) -> tuple[int, int]:
    if form == "residual":
        width = module.self_attn.o_proj.out_features
        return width, width
    if form == "norms":
        return module.weight.shape[0], 0
    return module.in_features, module.out_features


class FormStreams(TwoStreams):
    """Two streams of a model to which ``add`` has given a form."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        inner: Any = unwrapped(model)
        added = list(zip(getattr(inner, "form_places", ()), getattr(inner, "form_extras", ()), strict=True))
        self.extras: dict[nn.Module, Extra] = {at: extra for at, extra in added if isinstance(extra, Extra)}
        self.heads = {at: extra for at, extra in added if isinstance(extra, QueryHeads)}
        self._kept: dict[nn.Module, Tensor] = {}

    def encode(self, input_ids: Tensor, cache: EncoderCache, **options: Any) -> Tensor:
        """As in ``TwoStreams``; what forms read is kept."""
        with self._hooked(self._keep):
            return super().encode(input_ids, cache, **options)

    def _decode(self, input_ids: Tensor, cache: EncoderCache, positions: Tensor, mask: Any) -> Tensor:
        with self._hooked(self._add), ExitStack() as stack:
            for attention, heads in self.heads.items():
                stack.enter_context(heads.added(attention))
            return super()._decode(input_ids, cache, positions, mask)

    def predictions(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """As in ``TwoStreams``."""
        self._rows = batch.rows_with_loss()[0]
        return super().predictions(batch)

    @contextmanager
    def _hooked(self, hook: Callable[..., Any]) -> Iterator[None]:
        handles = [module.register_forward_hook(hook) for module in self.extras]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        form = self.extras[module].form
        if form in _READS:
            self._kept[module] = args[0] if form == "inputs" else _hidden(output)

    def _add(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        extra, hidden = self.extras[module], _hidden(output)
        read = self._read(module, hidden.shape[1]) if extra.form in _READS else args[0]
        changed = extra(hidden, read)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    def _read(self, module: nn.Module, count: int) -> Tensor:
        """What was kept, at the decoder's rows."""
        kept = self._kept[module]
        if count == kept.shape[1]:
            return kept
        return kept.gather(1, self._rows[:, :, None].expand(-1, -1, kept.shape[2]))


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def add(model: Any, form: Form, rank: int) -> None:
    """Give a model with an ICaRus adapter a form; its modules are trainable, and found by optimizers."""
    places = _places(model, form)
    model.form_places = places
    model.form_extras = nn.ModuleList(
        QueryHeads(module, rank) if form == "queries" else Extra(form, module, rank) for module in places
    )


def _places(model: Any, form: Form) -> list[nn.Module]:
    if form == "residual":
        return [module for module in model.modules() if hasattr(module, "self_attn")]
    if form == "queries":
        return [module.self_attn for module in model.modules() if hasattr(module, "self_attn")]
    if form == "inputs":
        return [module for module in model.modules() if hasattr(module, "lora_A")]
    if form == "head":
        return [model.get_output_embeddings()]
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


class FormTrainer(IcarusSFTTrainer):
    """Trains whatever ``add`` has added along with the adapter, and keeps it in checkpoints."""

    def _summed_loss(
        self, model: nn.Module, batch: Batch, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return FormStreams(model).loss(batch)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if extras := self._extras():
            torch.save(extras.state_dict(), Path(output_dir or self.args.output_dir) / _EXTRAS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if extras := self._extras():
            extras.load_state_dict(torch.load(Path(resume_from_checkpoint) / _EXTRAS, weights_only=True))

    def _extras(self) -> nn.Module | None:
        extras: nn.Module | None = getattr(unwrapped(self.model), "form_extras", None)
        return extras
