"""The two streams of ICaRus over an unmodified Transformers causal LM: the paper in one file.

ICaRus (arXiv 2603.13281, section 3) reads a decoder-only Transformer as a logical encoder, which turns tokens into
the KV cache, and a logical decoder, which predicts the next token from that cache. With h^E and h^D the hidden states
of the two streams, W the base weights and dW = s B A the adapter, layer by layer:

    k, v  = rope(Wk norm(h^E)), Wv norm(h^E)                             all that is ever cached
    h^E  += Wo attn(rope(Wq norm(h^E)), k, v)
    h^E  += mlp_W(norm(h^E))
    h^D  += (Wo + dWo) attn(rope((Wq + dWq) norm(h^D)), k, v)
    h^D  += mlp_{W + dW}(norm(h^D))

Both streams start from the token's embedding; logits come from h^D. dWk and dWv do not exist. No modelling code is
touched: a Transformers model hands its K/V to ``past_key_values.update`` and attends to what comes back, so a Cache
that hands back the encoder's K/V turns a pass of the model into a pass of the decoder stream. What follows:

* a decoder row reads encoder K/V and its own hidden state only, so decoder rows are computed only where a prediction
  is wanted (``decode``, ``loss``), and the result is that of decoder rows everywhere;
* with the adapter off the two streams are one, the base model (``encode`` returns its logits for nothing);
* both rows of one token can share a pass (``step``), so that the base weights are read once.

Shapes: B sequences, T cached positions, R decoder rows, V vocabulary, H KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from icarus import attention, model_length
from icarus.errors import InputError, UnsupportedModelError
from icarus.lora import LoraLayers, unwrapped

IGNORED = -100
"""The label that carries no loss (Transformers' convention)."""

_ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
_GROWTH = 1.5
_NEARLY_ALL = 0.9  # of the positions carry loss (docs/log.md)


# ---------------------------------------------------------------------------------------------- the cache


@dataclass
class _Buffer:
    """K and V of one layer, (B, H, capacity, D); ``used`` is how far any owner has written."""

    keys: Tensor
    values: Tensor
    used: int
    shared: bool = False


class EncoderCache:
    """The KV cache of B sequences of one length, written by the encoder stream alone.

    ``fork`` shares the buffers; whoever appends behind the last written position appends in place, anyone else
    copies first, so a fork costs nothing until it diverges and never disturbs its origin. A pass that fails halfway
    leaves ``length``, and so the contents, as they were.

    Sequences of different lengths are padded on the left: ``padding`` (B,) says how many positions of each hold no
    token. Nobody attends to these, and position ids count from the first token.
    """

    def __init__(self, padding: Tensor | None = None) -> None:
        self.length, self.padding = 0, padding
        self._buffers: dict[int, _Buffer] = {}

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, H, new, D) behind ``length`` in a layer; returns that layer's K and V including the new rows."""
        end = self.length + keys.shape[2]
        if layer not in self._buffers:
            self._buffers[layer] = _Buffer(_own(keys), _own(values), end)
            return keys, values
        buffer = self._buffers[layer]
        if buffer.used != self.length or end > buffer.keys.shape[2]:
            buffer = self._buffers[layer] = self._enlarged(buffer, end)
        buffer.keys[:, :, self.length : end] = keys
        buffer.values[:, :, self.length : end] = values
        buffer.used = end
        return buffer.keys[:, :, :end], buffer.values[:, :, :end]

    def _enlarged(self, buffer: _Buffer, needed: int) -> _Buffer:
        def grown(old: Tensor) -> Tensor:
            new = old.new_empty((*old.shape[:2], int(needed * _GROWTH) + 1, old.shape[3]))
            new[:, :, : self.length] = old[:, :, : self.length]
            return new

        return _Buffer(grown(buffer.keys), grown(buffer.values), self.length)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer, (B, H, T, D) each, as views."""
        buffer = self._buffers[index]
        return buffer.keys[:, :, : self.length], buffer.values[:, :, : self.length]

    def truncate(self, length: int) -> None:
        """Forget every position from ``length`` on."""
        self.length = min(self.length, length)
        for buffer in self._buffers.values():
            if not buffer.shared:
                buffer.used = min(buffer.used, self.length)

    def fork(self) -> EncoderCache:
        """A second cache with the same contents; nothing is copied until one of the two diverges."""
        twin = EncoderCache(self.padding)
        twin.length, twin._buffers = self.length, dict(self._buffers)
        for buffer in self._buffers.values():
            buffer.shared = True
        return twin

    @property
    def layers(self) -> int:
        """Number of layers written so far."""
        return len(self._buffers)

    @property
    def bytes(self) -> int:
        """Size of the K/V of the cached positions, in bytes."""
        return sum(t.numel() * t.element_size() for i in self._buffers for t in self.layer(i))


def _own(tensor: Tensor) -> Tensor:
    """A view of a fused projection would keep all of it in memory."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


# The three ways in which a pass of the model meets the cache. Transformers asks a Cache for its lengths to build the
# attention mask, and each attention layer calls ``update`` with its K/V and attends to what comes back.


class _Pass(Cache):
    def __init__(self, cache: EncoderCache, query_offset: int, kv_length: int) -> None:
        super().__init__(layers=[])
        self.encoder, self.query_offset, self.kv_length = cache, query_offset, kv_length
        self.seen: set[int] = set()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.query_offset

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.query_offset

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.kv_length, 0


class _EncoderPass(_Pass):
    """Encoder rows: K/V are written."""

    def __init__(self, cache: EncoderCache, rows: int) -> None:
        super().__init__(cache, cache.length, cache.length + rows)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.seen.add(layer_idx)
        return self.encoder.append(layer_idx, key_states, value_states)


class _DecoderPass(_Pass):
    """Decoder rows: their own K/V are dropped, the encoder's are read."""

    def __init__(self, cache: EncoderCache, rows: int) -> None:
        super().__init__(cache, cache.length - rows, cache.length)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.seen.add(layer_idx)
        return self.encoder.layer(layer_idx)


class _PairPass(_Pass):
    """One encoder and one decoder row per sequence, stacked on the batch axis: the first half writes, both read."""

    def __init__(self, cache: EncoderCache, *, once: bool) -> None:
        super().__init__(cache, cache.length, cache.length + 1)
        self.once = once  # attention takes each sequence's K/V once for both of its rows

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.seen.add(layer_idx)
        half = len(key_states) // 2
        keys, values = self.encoder.append(layer_idx, key_states[:half], value_states[:half])
        if self.once:
            return keys, values
        if half == 1:  # a view: the one sequence's K/V are read once and stay in the processor's cache
            return keys.expand(2, -1, -1, -1), values.expand(2, -1, -1, -1)
        return torch.cat([keys, keys]), torch.cat([values, values])


# ------------------------------------------------------------------------------------------- the streams


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A training batch: token ids, which of them carry loss, and how they lie in the rows. All (B, T).

    ``labels`` equal ``input_ids`` where a token carries loss, else -100 (not shifted, as Transformers has it).
    ``position_ids`` count from 0 in each document. ``document_ids`` tell packed documents apart; -1 is padding.
    ``branch_ids`` are 0 on a prompt that several completions share, 1, 2, ... on those completions.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    document_ids: Tensor
    branch_ids: Tensor

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        branch_ids: Tensor | None = None,
    ) -> Batch:
        """Fill in what a collator leaves out; ``position_ids`` that start again at 0 mean packed documents."""
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
        branches = torch.zeros_like(input_ids) if branch_ids is None else branch_ids
        if position_ids is None:
            if branch_ids is not None and bool(branch_ids.any()):
                raise InputError("Branches need position_ids: each continues from the end of the shared prompt.")
            position_ids = (real.cumsum(1) - 1).clamp(min=0)
        starts = (position_ids == 0) & real.bool()
        documents = torch.where(real.bool(), starts.cumsum(1), -1)
        return cls(
            input_ids=input_ids,
            labels=labels,
            position_ids=position_ids,
            document_ids=documents,
            branch_ids=branches,
        )

    @property
    def is_plain(self) -> bool:
        """One document a row, no branches: the model's own masks do."""
        real = self.document_ids >= 0
        first = torch.where(real, self.document_ids, self.document_ids.amax(1, keepdim=True))
        return bool((first == first[:, :1]).all()) and not bool(self.branch_ids.any())

    def rows_with_loss(self) -> tuple[Tensor, Tensor]:
        """(rows, targets), both (B, R): the position whose decoder row predicts, and the token it must predict.

        A token is predicted from the one before it; a completion's first token from the end of the shared prompt.
        Rows are padded with target -100.
        """
        index = torch.arange(self.input_ids.shape[1], device=self.input_ids.device).expand_as(self.input_ids)
        trunk = (self.branch_ids == 0) & (self.document_ids >= 0)
        trunk_end = torch.where(trunk, index, 0).cummax(1).values  # of each position's own document
        opens = self.branch_ids != F.pad(self.branch_ids[:, :-1], (1, 0))
        parents = torch.where(opens, trunk_end, (index - 1).clamp(min=0))
        same = self.document_ids.gather(1, parents) == self.document_ids
        wanted = (self.labels != IGNORED) & same & (self.document_ids >= 0) & (self.position_ids > 0)
        count = max(int(wanted.sum(1).max()), 1)
        chosen = wanted.int().argsort(dim=1, descending=True, stable=True)[:, :count]
        targets = torch.where(wanted, self.labels, IGNORED).gather(1, chosen)
        return parents.gather(1, chosen), targets


class TwoStreams:
    """Encoder and decoder passes over one causal LM, with or without LoRA adapters attached by PEFT.

    Args:
        model: a Transformers causal LM or a PEFT model around one, in eager or sdpa attention.

    Raises:
        UnsupportedModelError: a model for which the method cannot hold; the message says why.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config: Any = unwrapped(model).config.get_text_config()  # type: ignore[union-attr, operator]
        self.lora = LoraLayers(model)
        _refuse_unsupported(model, self.config)
        self._steady_length = model_length.steady_length(self.config)
        self._own_attention = attention.replaceable(_transformers_model(model))
        self._pairs = True

    @torch.no_grad()
    def encode(
        self, input_ids: Tensor, cache: EncoderCache, *, batch: Batch | None = None, logits_to_keep: int = 1
    ) -> Tensor:
        """Logical encoder: base weights write the K/V of ``input_ids`` (B, new) behind what the cache holds.

        Returns the base model's logits of the last ``logits_to_keep`` positions, (B, logits_to_keep, V): they are a
        by-product. ``batch`` gives padding, packing and branches of a training batch.
        """
        new = input_ids.shape[1]
        view = _EncoderPass(cache, new)
        if batch is None:
            positions, mask = _placed(cache, cache.length + new, input_ids)
        else:
            positions = batch.position_ids
            mask = self.mask(batch)
        self._check_length(positions)
        with _evaluating(self.model), self.lora.off():
            out = self.model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=view,
                use_cache=True,
                logits_to_keep=_last(logits_to_keep, input_ids),
            )
        self._check_complete(view)
        cache.length += new
        return out.logits  # type: ignore[no-any-return]

    @torch.no_grad()
    def decode(self, input_ids: Tensor, cache: EncoderCache, adapter: str | None) -> Tensor:
        """Logical decoder: ``adapter`` (None: no adapter, the base model) predicts behind the last R cached tokens.

        ``input_ids`` (B, R) are the tokens at those positions. Returns logits (B, R, V); nothing is written.
        """
        positions, mask = _placed(cache, cache.length, input_ids)
        if adapter is not None:
            self.lora.activate(adapter)
        with _evaluating(self.model), self.lora.off() if adapter is None else nullcontext():
            return self._decode(input_ids, cache, positions, mask)

    def step(self, token: Tensor, cache: EncoderCache, adapter: str, *, parallel: bool = True) -> tuple[Tensor, Tensor]:
        """One token (B, 1) through both streams: its K/V are written, the decoder predicts the next one.

        In parallel, encoder and decoder row share one pass, so the base weights are read once; else two passes.
        Returns the logits (B, V) of the decoder with ``adapter``, and those of the base model.
        """
        self.lora.check_attached(adapter)
        if not parallel:
            base = self.encode(token, cache)
            return self.decode(token, cache, adapter)[:, -1], base[:, -1]
        once = self._pairs and self._own_attention and len(token) > 1 and token.device.type == "cpu"
        try:
            logits = self._pair(token, cache, adapter, once=once)
        except (RuntimeError, TypeError):
            if not once:
                raise
            self._pairs = False  # such as Doge, which makes a mask of V before attention
            logits = self._pair(token, cache, adapter, once=False)
        cache.length += 1
        return logits[len(token) :], logits[: len(token)]

    @torch.no_grad()
    def _pair(self, token: Tensor, cache: EncoderCache, adapter: str, *, once: bool) -> Tensor:
        """Logits (2B, V) of one pass with both rows of each sequence."""
        pair = torch.cat([token, token])
        positions, mask = _placed(cache, cache.length + 1, pair)
        self._check_length(positions)
        with (
            _evaluating(self.model),
            self.lora.on_second_half(adapter),
            attention.replaced(self.config, attention.PAIRED, on=once) as replaced,
        ):
            view = _PairPass(cache, once=replaced)
            logits = self.model(
                input_ids=pair, attention_mask=mask, position_ids=positions, past_key_values=view, use_cache=True
            ).logits[:, -1]
        self._check_complete(view)
        return logits  # type: ignore[no-any-return]

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Training pass: the summed cross-entropy (scalar) of ``predictions``, their logits and their targets."""
        logits, targets, _ = self.predictions(batch)
        total = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return total, logits, targets

    def predictions(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Encoder rows for all tokens without gradient, decoder rows where a token carries loss.

        Returns the decoder's logits (B, R, V), their targets (B, R; -100 pads), and the positions (B, R) at which they
        were predicted.
        """
        cache = EncoderCache()
        self.encode(batch.input_ids, cache, batch=batch)
        rows, targets = batch.rows_with_loss()
        if batch.is_plain and rows.shape[1] > _NEARLY_ALL * batch.input_ids.shape[1]:
            # All positions, in causal attention that needs no mask, take less.
            logits = self._decode(batch.input_ids, cache, batch.position_ids, self.mask(batch))
            predictable = torch.where(batch.position_ids > 0, batch.labels, IGNORED)
            targets = F.pad(predictable[:, 1:], (0, 1), value=IGNORED)
            return logits, targets, torch.arange(logits.shape[1], device=logits.device).expand_as(targets)
        ids, positions = batch.input_ids.gather(1, rows), batch.position_ids.gather(1, rows)
        with attention.replaced(self.config, attention.GROUPED, on=self._groups(ids.device)):
            logits = self._decode(ids, cache, positions, self._masks(batch, rows))
        return logits, targets, rows

    def probe(self) -> None:
        """Check that this model's decoder rows at selected positions give its own logits; run it before training.

        A model that takes a row's place in its batch for its position (GPT-Neo does) would train wrong in silence.

        Raises:
            UnsupportedModelError: they differ.
        """
        device = next(self.model.parameters()).device
        ids = (torch.arange(12, device=device) * 7 + 3)[None] % self.config.vocab_size
        labels = torch.full_like(ids, IGNORED).index_copy(
            1, picked := torch.tensor([5, 8, 11], device=device), ids[:, picked]
        )
        try:
            with torch.no_grad(), _evaluating(self.model), self.lora.off():
                own = self.model(input_ids=ids, use_cache=False).logits[:, picked - 1]
                _, logits, _ = self.loss(Batch.of(ids, labels))
            close = (logits - own).abs().float() <= 0.02 * float(own.abs().max())
            same = int(close.all(-1).sum()) >= 2  # in bfloat16 one row of three may meet another expert
        except (ValueError, RuntimeError, TypeError):
            same = False
        if not same:
            raise UnsupportedModelError(
                f"{type(unwrapped(self.model)).__name__} does not give its own logits for selected rows, "
                "so decoder rows only where the loss is would be wrong; train another base model."
            )

    def _decode(self, input_ids: Tensor, cache: EncoderCache, positions: Tensor, mask: Any) -> Tensor:
        view = _DecoderPass(cache, input_ids.shape[1])
        with _cache_under_checkpointing(self.model):
            out = self.model(
                input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=view, use_cache=True
            )
        self._check_complete(view)
        return out.logits  # type: ignore[no-any-return]

    def mask(self, batch: Batch) -> Any:
        """What a pass over all tokens of a batch takes as ``attention_mask``: of padding alone, where that does."""
        return (batch.document_ids >= 0).long() if batch.is_plain else self._masks(batch, None)

    def _masks(self, batch: Batch, rows: Tensor | None) -> Any:
        """What each row (B, R) sees of the T encoder positions, in the form in which the model takes it."""
        kinds = getattr(self.config, "layer_types", None)
        if kinds:
            return {kind: self._mask(batch, rows, kind) for kind in set(kinds)}
        if getattr(self.config, "sliding_window", None):
            return self._mask(batch, rows, "sliding_attention")
        return self._mask(batch, rows, "full_attention")

    def _mask(self, batch: Batch, rows: Tensor | None, kind: str) -> Tensor:
        visible = _visible(batch, rows, kind, self.config)[:, None]
        if self.config._attn_implementation != "eager":
            return visible
        dtype = next(self.model.parameters()).dtype
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
            ~visible, torch.finfo(dtype).min
        )

    def _groups(self, device: torch.device) -> bool:
        """Not where the backward pass computes again, which would be outside the block."""
        return self._own_attention and device.type == "cpu" and not _checkpointed(self.model)

    def _check_length(self, positions: Tensor) -> None:
        if self._steady_length:
            model_length.refuse_longer(int(positions.max()) + 1, self._steady_length, self.config.model_type)

    def _check_complete(self, view: _Pass) -> None:
        """A layer that bypasses the cache would attend to its own K/V: plain LoRA, and silently wrong."""
        missing = set(range(self.config.num_hidden_layers)) - view.seen
        if missing:
            raise UnsupportedModelError(
                f"Layers {sorted(missing)} of {type(unwrapped(self.model)).__name__} did not ask the cache for their "
                "K/V, so the decoder stream could not read the encoder's; use a model whose attention layers all go "
                "through past_key_values."
            )


def _last(count: int, input_ids: Tensor) -> int | Tensor:
    """The last positions of tokens (B, T), in the form in which Transformers models take them.

    A number makes a slice of the hidden states. With several sequences that slice has gaps, and torch's linear then
    copies lm_head for each of them. Indices make a copy of the hidden states without gaps.
    """
    length = input_ids.shape[1]
    return count if len(input_ids) == 1 else torch.arange(length - count, length, device=input_ids.device)


def _placed(cache: EncoderCache, end: int, input_ids: Tensor) -> tuple[Tensor, Any]:
    """Position ids of the rows (B, R) that end at position ``end`` of the cache, and the mask (B, end) of its padding.

    B may be a multiple of the cache's sequences, whose rows are then stacked.
    """
    index = torch.arange(end, device=input_ids.device)[None]
    if cache.padding is None:
        return index[:, end - input_ids.shape[1] :], None
    padding = cache.padding.repeat(len(input_ids) // len(cache.padding))
    places = index - padding[:, None]
    return places[:, end - input_ids.shape[1] :].clamp(min=0), (places >= 0).long()


def _visible(batch: Batch, rows: Tensor | None, kind: str, config: Any) -> Tensor:
    """(B, R, T) booleans: row r sees position t if t is not later, in the same document, on its branch or the trunk."""

    def of_rows(values: Tensor) -> Tensor:
        return (values if rows is None else values.gather(1, rows))[:, :, None]

    q_position, k_position = of_rows(batch.position_ids), batch.position_ids[:, None]
    k_branch = batch.branch_ids[:, None]
    visible = (k_position <= q_position) & (of_rows(batch.document_ids) == batch.document_ids[:, None])
    visible &= (k_branch == 0) | (k_branch == of_rows(batch.branch_ids))
    if kind == "sliding_attention":
        visible &= q_position - k_position < config.sliding_window
    elif kind == "chunked_attention":
        visible &= q_position // config.attention_chunk_size == k_position // config.attention_chunk_size
    return visible


# ------------------------------------------------------------------------------- what a pass needs around it


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The encoder is frozen: it has no dropout, and gradient checkpointing (which drops the cache) is off."""
    if not model.training:  # the usual case; walking all modules twice would cost a tenth of a small model's step
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


@contextmanager
def _cache_under_checkpointing(model: nn.Module) -> Iterator[None]:
    """Let checkpointed layers keep ``past_key_values``; Transformers drops it, since a writer would write twice.

    The decoder stream only reads. Transformers has the switch for such layers (modeling_layers.py,
    ``_can_checkpoint_with_cache``); where a version lacks it, ``_check_complete`` refuses.
    """
    layers = _checkpointed(model)
    for layer in layers:
        layer._can_checkpoint_with_cache = True
    try:
        yield
    finally:
        for layer in layers:
            del layer._can_checkpoint_with_cache


def _checkpointed(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers whose activations are computed again in the backward pass."""
    if not model.training:
        return []
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]


def _refuse_unsupported(model: nn.Module, config: Any) -> None:
    name = type(unwrapped(model)).__name__ if not hasattr(config, "model_type") else config.model_type
    why = None
    if getattr(unwrapped(model).config, "is_encoder_decoder", False):
        why = "it is an encoder-decoder: its decoder has K/V of its own kind; choose a decoder-only model"
    elif getattr(_transformers_model(model), "_is_stateful", False) or _foreign_layers(config):
        kinds = ", ".join(_foreign_layers(config)) or "recurrent state"
        why = f"it keeps state that is no KV cache ({kinds}), which decoder rows cannot share; choose a Transformer"
    elif config._attn_implementation not in ("sdpa", "eager"):
        why = f"attention is {config._attn_implementation!r}; load the model with attn_implementation='sdpa'"
    if why:
        raise UnsupportedModelError(f"ICaRus cannot run on {name}: {why}.")


def _transformers_model(model: nn.Module) -> nn.Module:
    inner = unwrapped(model)
    get_base = getattr(inner, "get_base_model", None)
    return get_base() if callable(get_base) else inner


def _foreign_layers(config: Any) -> list[str]:
    return sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION_KINDS)
