"""The two streams against an independent reference, against the base model, and against themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import reference
from icarus import lora
from icarus import streams as under_test
from icarus.errors import InputError, UnsupportedModelError
from icarus.streams import IGNORED, Batch, EncoderCache, TwoStreams
from tiny_models import FAMILIES, VOCAB, lora_of, shape_of, tiny, tokens, with_adapters

ROUNDING = {"rtol": 1e-4, "atol": 2e-5}
all_families = pytest.mark.parametrize("family", FAMILIES)
both_attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def _adapted(family: str = "llama", **options: Any) -> TwoStreams:
    return TwoStreams(with_adapters(tiny(family, **options)))


def _kv(cache: EncoderCache) -> list[Tensor]:
    return [t for layer in range(cache.layers) for t in cache.layer(layer)]


def _equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@contextmanager
def _must_fail() -> Iterator[None]:
    with pytest.raises(AssertionError):
        yield


# --------------------------------------------------------------------------------- 1: the paper's equations


@pytest.fixture(params=["llama", "qwen3"])
def paper(request: pytest.FixtureRequest) -> tuple[TwoStreams, Callable[..., Any]]:
    """The code under test, and the reference on the same weights."""
    base = tiny(request.param)
    weights, shape = {k: v.clone() for k, v in base.state_dict().items()}, shape_of(base.config)
    model = with_adapters(base)

    def of(stream: Callable[..., Any], adapter: str, ids: Tensor, **extra: Any) -> Any:
        return stream(weights, {**lora_of(model, adapter), **extra}, ids, shape)

    return TwoStreams(model), of


def test_streams_equal_the_equations(paper: Any) -> None:
    streams, of = paper
    ids, cache = tokens(1, 24), EncoderCache()
    base = streams.encode(ids, cache, logits_to_keep=24)
    for adapter in ("one", "two"):
        want = of(reference.two_streams, adapter, ids[0])
        torch.testing.assert_close(streams.decode(ids, cache, adapter)[0], want.logits, **ROUNDING)
        torch.testing.assert_close(base[0], want.base, **ROUNDING)
        for layer, (k, v) in enumerate(want.kv):
            torch.testing.assert_close(cache.layer(layer)[0][0], k, **ROUNDING)
            torch.testing.assert_close(cache.layer(layer)[1][0], v, **ROUNDING)


def test_gradients_equal_those_of_the_equations(paper: Any) -> None:
    streams, of = paper
    ids = tokens(1, 15)
    total, _, _ = streams.loss(Batch.of(ids, ids))
    total.backward()
    lora = {k: (a.requires_grad_(), b.requires_grad_(), s) for k, (a, b, s) in lora_of(streams.model, "one").items()}
    logits = of(reference.two_streams, "one", ids[0], **lora).logits
    want = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
    torch.testing.assert_close(total, want, **ROUNDING)
    want.backward()
    for name, module in streams.model.named_modules():
        if (key := name.removeprefix("base_model.model.")) in lora:
            for got, wanted in zip((module.lora_A["one"], module.lora_B["one"]), lora[key], strict=False):
                torch.testing.assert_close(got.weight.grad, wanted.grad, **ROUNDING)


def test_the_method_is_neither_plain_lora_nor_lora_without_kv(paper: Any) -> None:
    """The reference can tell them apart, and PEFT's own forward is the one that ICaRus is not."""
    streams, of = paper
    ids = tokens(1, 24)
    icarus = of(reference.two_streams, "one", ids[0])
    without_kv = of(reference.one_stream, "one", ids[0])
    kv = {f"model.layers.{i}.self_attn.v_proj": (torch.randn(4, 64), torch.randn(32, 4) * 0.1, 1.0) for i in range(3)}
    plain = of(reference.one_stream, "one", ids[0], **kv)
    streams.model.set_adapter("one")
    with torch.no_grad():
        torch.testing.assert_close(streams.model(ids).logits[0], without_kv.logits, **ROUNDING)
    for other in (without_kv, plain):
        assert (icarus.logits - other.logits).abs().mean() > 0.1
        assert (icarus.kv[1][0] - other.kv[1][0]).abs().mean() > 0.1
    assert torch.equal(icarus.kv[0][0], without_kv.kv[0][0])  # the difference begins behind the first layer


# ------------------------------------------------------------------------------------ 2: bit for bit the base


@all_families
@both_attentions
def test_without_adapter_both_streams_are_the_base_model(family: str, attention: str) -> None:
    base, streams = tiny(family, attention=attention), _adapted(family, attention=attention)
    ids, cache, past = tokens(2, 20), EncoderCache(), DynamicCache()
    with torch.no_grad():
        want = base(ids, past_key_values=past).logits
        assert torch.equal(base(ids, use_cache=False).logits, want)
        assert torch.equal(streams.encode(ids, cache, logits_to_keep=20), want)
        assert torch.equal(streams.decode(ids, cache, None), want)
        for token in tokens(2, 3, seed=8).T[..., None]:
            want = base(token, past_key_values=past).logits
            assert torch.equal(streams.encode(token, cache), want)
            assert torch.equal(streams.decode(token, cache, None), want)
        assert not torch.allclose(streams.decode(ids, cache, "one")[:, -1], want[:, -1], atol=0.05)


def _assert_kv_is_the_bases(streams: TwoStreams, base: Any, parallel: bool) -> None:
    """Two adapters take turns; the base model replays their tokens in passes of the same shapes."""
    ids, cache, past, predicted = tokens(1, 20), EncoderCache(), DynamicCache(), []
    with torch.no_grad():
        streams.encode(ids, cache)
        token = ids[:, -1:]
        for speaker in ("one", "one", "two", "one", "two"):
            logits, _ = streams.step(token, cache, speaker, parallel=parallel)
            predicted.append(token)
            token = logits.argmax(-1, keepdim=True)
        base(ids, past_key_values=past)
        if parallel:
            past.batch_repeat_interleave(2)
        for token in predicted:
            base(token.expand(1 + parallel, 1), past_key_values=past)
    want = [t[:1] for layer in past.layers for t in (layer.keys, layer.values)]
    if parallel and base.config.model_type == "qwen3_moe":
        # Each expert's matmul has as many rows as chose it, and the decoder row chooses too: no equal shapes.
        torch.testing.assert_close(_kv(cache), want, **ROUNDING)
    else:
        assert _equal(_kv(cache), want)


@all_families
@both_attentions
@pytest.mark.parametrize("parallel", [False, True])
def test_kv_of_prompt_and_generated_tokens_is_the_bases(family: str, attention: str, parallel: bool) -> None:
    _assert_kv_is_the_bases(_adapted(family, attention=attention), tiny(family, attention=attention), parallel)


def test_that_kv_test_sees_an_adapter_in_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora.LoraLayers, "off", lambda self: under_test._evaluating(self.model))
    with _must_fail():
        _assert_kv_is_the_bases(_adapted(), tiny(), False)


def test_kv_does_not_depend_on_who_speaks() -> None:
    streams, held = _adapted("gemma3_text"), []
    for speaker in ("one", "two"):
        streams.encode(tokens(3, 12), cache := EncoderCache())
        for token in tokens(3, 4).T[..., None]:
            streams.step(token, cache, speaker)
        held.append(_kv(cache))
    assert _equal(*held)


# -------------------------------------------------------------------------------------------- 3: training


Document = tuple[list[int], list[int]]


def _document(length: int, seed: int) -> Document:
    """Token ids, and labels in several spans (an assistant's turns)."""
    ids = tokens(length, seed=seed).tolist()
    return ids, [t if i % 7 in (3, 4, 6) else IGNORED for i, t in enumerate(ids)]


DOCUMENTS = [_document(17, 1), _document(8, 2), _document(11, 3), _document(13, 4)]


def _padded(rows: list[list[int]], fill: int, left: bool = False) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([([fill] * (width - len(r)) + r) if left else r + [fill] * (width - len(r)) for r in rows])


def _separate(documents: list[Document] = DOCUMENTS) -> list[Batch]:
    return [Batch.of(torch.tensor([ids]), torch.tensor([labels])) for ids, labels in documents]


def _rows(left: bool) -> tuple[Batch, list[Batch]]:
    ids, labels = ([d[i] for d in DOCUMENTS] for i in (0, 1))
    real = _padded([[1] * len(d) for d in ids], 0, left)
    return Batch.of(_padded(ids, 0, left), _padded(labels, IGNORED, left), real), _separate()


def _packed() -> tuple[Batch, list[Batch]]:
    rows = [DOCUMENTS[:2], DOCUMENTS[2:]]
    ids, labels = ([[t for d in row for t in d[i]] for row in rows] for i in (0, 1))
    positions = [[i for d in row for i in range(len(d[0]))] for row in rows]
    real = _padded([[1] * len(r) for r in ids], 0)
    return Batch.of(_padded(ids, 0), _padded(labels, IGNORED), real, _padded(positions, 0)), _separate()


def _branched(documents: int = 1) -> tuple[Batch, list[Batch]]:
    """Three completions on one prompt, in each of some packed documents, beside a shorter row without branches."""
    ids, labels, positions, branches, alone = [], [], [], [], []
    for document in range(documents):
        prompt = tokens(9, seed=20 + document).tolist()
        ids, labels = ids + prompt, labels + [IGNORED] * 9
        positions, branches = positions + list(range(9)), branches + [0] * 9
        for branch, length in enumerate((5, 8, 3), 1):
            completion = tokens(length, seed=30 + 10 * document + branch).tolist()
            ids, labels = ids + completion, labels + completion
            positions, branches = positions + list(range(9, 9 + length)), branches + [branch] * length
            alone.append((prompt + completion, [IGNORED] * 9 + completion))
    short, short_labels = DOCUMENTS[2]
    batch = Batch.of(
        _padded([ids, short], 0),
        _padded([labels, short_labels], IGNORED),
        _padded([[1] * len(ids), [1] * len(short)], 0),
        _padded([positions, list(range(len(short)))], 0),
        _padded([branches, [0] * len(short)], 0),
    )
    return batch, _separate([*alone, DOCUMENTS[2]])


LAYOUTS: dict[str, Callable[[], tuple[Batch, list[Batch]]]] = {
    "right": partial(_rows, False),
    "left": partial(_rows, True),
    "packed": _packed,
    "branches": _branched,
    "packed branches": partial(_branched, 2),
}


def _loss(streams: TwoStreams, batch: Batch, everywhere: bool) -> tuple[Tensor, Tensor, Tensor]:
    return reference.loss_everywhere(streams, batch) if everywhere else streams.loss(batch)


def _trained(streams: TwoStreams, batches: list[Batch], everywhere: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, logits where there is loss, and the adapter's whole gradient, of some batches together."""
    streams.model.zero_grad()
    results = [_loss(streams, batch, everywhere) for batch in batches]
    total = torch.stack([r[0] for r in results]).sum()
    total.backward()
    picked = torch.cat([logits[targets != IGNORED] for _, logits, targets in results])
    assert {n.split(".")[-2] for n, p in streams.model.named_parameters() if p.grad is not None} == {"one"}
    grads = torch.cat([p.grad.flatten() for p in streams.model.parameters() if p.grad is not None])
    assert grads.abs().mean() > 0.01
    return total.detach(), picked.detach(), grads


def _assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float = 1e-5) -> None:
    for name, a, b in zip(("loss", "logits", "gradients"), got, want, strict=True):
        assert a.shape == b.shape, name
        error = (a - b).float().norm() / b.float().norm()
        assert error < tolerance, f"{name}: relative error {error}"


@all_families
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_where_needed_everywhere_and_separate_rows_train_the_same(family: str, layout: str) -> None:
    streams = _adapted(family)
    batch, alone = LAYOUTS[layout]()
    want = _trained(streams, alone, everywhere=True)
    _assert_same(_trained(streams, [batch]), want)
    _assert_same(_trained(streams, [batch], everywhere=True), want)
    rows, _ = batch.rows_with_loss()
    assert rows.shape[1] < batch.input_ids.shape[1]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"),
    [("eager", torch.float32, 1e-5), ("sdpa", torch.bfloat16, 0.05), ("eager", torch.bfloat16, 0.05)],
)
def test_the_same_in_eager_attention_and_in_bfloat16(
    family: str, layout: str, attention: str, dtype: torch.dtype, tolerance: float
) -> None:
    streams = _adapted(family, attention=attention, dtype=dtype)
    batch, alone = LAYOUTS[layout]()
    want = _trained(streams, alone, everywhere=True)
    _assert_same(_trained(streams, [batch]), want, tolerance)


@pytest.mark.parametrize(
    ("layout", "blinded"),
    [
        ("packed", {"document_ids": torch.ones}),
        ("branches", {"branch_ids": torch.zeros}),
        ("left", {"document_ids": torch.ones}),
    ],
)
def test_that_layout_test_sees_what_a_row_must_not_see(layout: str, blinded: dict[str, Callable[..., Any]]) -> None:
    streams = _adapted()
    batch, alone = LAYOUTS[layout]()
    real_rows, real_targets = batch.rows_with_loss()
    blind = replace(batch, **{k: make(batch.input_ids.shape, dtype=torch.long) for k, make in blinded.items()})
    object.__setattr__(blind, "rows_with_loss", lambda: (real_rows, real_targets))
    with _must_fail():
        _assert_same(_trained(streams, [blind]), _trained(streams, alone), 0.01)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_that_layout_test_sees_a_missing_window(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    streams, (batch, alone) = _adapted(family), _packed()
    want = _trained(streams, alone)
    seen = under_test._visible
    monkeypatch.setattr(under_test, "_visible", lambda b, r, kind, config: seen(b, r, "full_attention", config))
    with _must_fail():
        _assert_same(_trained(streams, [batch]), want, 0.01)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_decode_of_the_last_rows_is_that_of_all(family: str) -> None:
    streams, ids = _adapted(family), tokens(2, 20)
    streams.encode(ids, cache := EncoderCache())
    whole = streams.decode(ids, cache, "one")
    for rows in (1, 2, 7, 19):
        torch.testing.assert_close(streams.decode(ids[:, -rows:], cache, "one"), whole[:, -rows:], **ROUNDING)


class _Products(TorchDispatchMode):
    """Notes the shapes of batched products: torch's linear makes them, and copies the weight, where rows have gaps."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.bmm.default:
            self.shapes.append(out.shape)
        return out


@pytest.mark.parametrize("kept", [1, 3])
def test_logits_of_several_sequences_do_not_copy_the_head(kept: int) -> None:
    streams, ids = TwoStreams(tiny("llama").requires_grad_(False)), tokens(8).expand(3, -1)
    whole = streams.encode(ids, EncoderCache(), logits_to_keep=8)
    with _Products() as products:
        last = streams.encode(ids, EncoderCache(), logits_to_keep=kept)
    torch.testing.assert_close(last, whole[:, -kept:], **ROUNDING)
    assert not [shape for shape in products.shapes if shape[-1] == VOCAB]


def test_dropout_is_for_the_decoder_alone_and_modes_are_restored() -> None:
    streams = TwoStreams(with_adapters(tiny(attention_dropout=0.5), lora_dropout=0.5))
    ids, quiet, noisy = tokens(2, 20), EncoderCache(), EncoderCache()
    want = streams.encode(ids, quiet, logits_to_keep=20)
    streams.model.train()
    assert torch.equal(streams.encode(ids, noisy, logits_to_keep=20), want)
    assert _equal(_kv(noisy), _kv(quiet))
    assert torch.equal(streams.decode(ids, noisy, None), want)
    assert torch.equal(streams.decode(ids, noisy, "one"), streams.decode(ids, noisy, "one"))
    assert streams.model.training
    losses = {float(streams.loss(Batch.of(ids, ids))[0].detach()) for _ in range(2)}
    assert len(losses) == 2


def test_distributed_data_parallel_trains_the_same(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, streams = _adapted(), TwoStreams(torch.nn.parallel.DistributedDataParallel(_adapted().model))
        _assert_same(_trained(streams, [_packed()[0]]), _trained(plain, [_packed()[0]]), 1e-6)
        streams.encode(ids := tokens(1, 9), cache := EncoderCache())
        assert torch.equal(streams.decode(ids, cache, "two"), plain.decode(ids, cache, "two"))
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------- 4: gradient checkpointing


def _checkpointed(family: str, **options: Any) -> TwoStreams:
    streams = _adapted(family)
    streams.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or {"use_reentrant": False})
    streams.model.train()
    return streams


@all_families
def test_gradient_checkpointing_trains_the_same(family: str) -> None:
    batch, _ = _packed()
    plain = _adapted(family)
    plain.model.train()
    streams, ran = _checkpointed(family), []
    streams.model.get_base_model().model.layers[1].mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    _assert_same(_trained(streams, [batch]), _trained(plain, [batch]), 1e-6)
    assert len(ran) == 3  # encoder, decoder, and the decoder once more on the way back
    assert not any(getattr(m, "_can_checkpoint_with_cache", False) for m in streams.model.modules())


def test_reentrant_checkpointing_trains_the_same() -> None:
    streams = _checkpointed("llama", use_reentrant=True)
    streams.model.enable_input_require_grads()
    _assert_same(_trained(streams, [_packed()[0]]), _trained(_adapted(), [_packed()[0]]), 1e-6)


def _bypass(streams: TwoStreams) -> None:
    attention = streams.model.get_base_model().model.layers[1].self_attn
    attention.forward = partial(_without_cache, attention.forward)


def _without_cache(forward: Callable[..., Any], *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
    return forward(*args, past_key_values=None, **kwargs)


@pytest.mark.parametrize("how", ["checkpointed layers lose the cache", "a layer bypasses the cache"])
def test_a_layer_without_the_cache_is_refused_not_trained_as_plain_lora(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = _separate()[0]
    right = _trained(_adapted(), [batch], everywhere=True)
    if how.startswith("checkpointed"):
        streams = _checkpointed("llama")
        monkeypatch.setattr(under_test, "_cache_under_checkpointing", _switch_forced_off)
    else:
        streams = _adapted()
        _bypass(streams)
    with pytest.raises(UnsupportedModelError, match="did not ask the cache"):
        reference.loss_everywhere(streams, batch)
    monkeypatch.setattr(TwoStreams, "_check_complete", lambda *_: None)  # what the guard prevents:
    with _must_fail():
        _assert_same(_trained(streams, [batch], everywhere=True), right, 0.01)


@contextmanager
def _switch_forced_off(model: Any) -> Iterator[None]:
    yield


# ------------------------------------------------------------------------------------ 5: both rows in one pass


def _assert_parallel_equals_sequential(
    streams: TwoStreams, sequences: int, speakers: Sequence[str] = ("one", "two", "two", "one")
) -> None:
    together, apart = EncoderCache(), EncoderCache()
    for cache in (together, apart):
        streams.encode(tokens(sequences, 15), cache)
    for token, speaker in zip(tokens(sequences, len(speakers), seed=3).T[..., None], speakers, strict=True):
        got = streams.step(token, together, speaker)
        want = streams.step(token, apart, speaker, parallel=False)
        for a, b in zip(got, want, strict=True):
            assert a.shape == (sequences, VOCAB)
            torch.testing.assert_close(a, b, **ROUNDING)
        assert not torch.allclose(*want, atol=0.05)  # the two rows are not the same
    torch.testing.assert_close(_kv(together), _kv(apart), **ROUNDING)


@all_families
@both_attentions
@pytest.mark.parametrize("sequences", [1, 3])
def test_parallel_step_equals_sequential_step(family: str, attention: str, sequences: int) -> None:
    _assert_parallel_equals_sequential(_adapted(family, attention=attention), sequences)


@pytest.mark.parametrize("rows", [slice(None), slice(0)], ids=["on all rows", "on none"])
def test_that_parallel_test_sees_an_adapter_on_the_wrong_rows(rows: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    def everywhere(layer: Any, adapter: str | None) -> Callable[..., Tensor]:
        if adapter is None:
            return lambda x: layer.base_layer(x)

        def forward(x: Tensor) -> Tensor:
            y = layer.base_layer(x)
            y[rows] += layer.lora_B[adapter](layer.lora_A[adapter](x[rows])) * layer.scaling[adapter]
            return y

        return forward

    monkeypatch.setattr(lora, "_forward", everywhere)
    with _must_fail():
        _assert_parallel_equals_sequential(_adapted(), 3)


@pytest.mark.parametrize("active", ["one", "two"])
def test_adapters_with_different_targets_do_not_meet(active: str) -> None:
    model = with_adapters(tiny(), ["one"], target_modules=["q_proj", "down_proj"])
    streams = TwoStreams(with_adapters(model, ["two"], target_modules=["o_proj", "down_proj"]))
    streams.encode(tokens(1, 9), cache := EncoderCache())
    streams.decode(tokens(1, 1), cache, active)  # leaves this one active
    _assert_parallel_equals_sequential(streams, 1)
    together, apart = cache.fork(), cache.fork()
    streams.decode(tokens(1, 1), cache, active)
    got, want = streams.step(tokens(1, 1), together, "one"), streams.step(tokens(1, 1), apart, "one", parallel=False)
    torch.testing.assert_close(got, want, **ROUNDING)
    torch.testing.assert_close(_kv(together), _kv(apart), **ROUNDING)


def test_adapters_attached_or_replaced_between_steps_are_noticed() -> None:
    streams = TwoStreams(with_adapters(tiny(), ["one"], target_modules=["q_proj", "down_proj"]))
    _assert_parallel_equals_sequential(streams, 1, ["one"])  # what it learns of the model here is stale from now on
    with_adapters(streams.model, ["two"], target_modules=["o_proj"]).set_adapter("two")
    _assert_parallel_equals_sequential(streams, 1, ["one", "two"])
    streams.model.delete_adapter("one")
    with_adapters(streams.model, ["one"], seed=5, target_modules=["gate_proj"])
    _assert_parallel_equals_sequential(streams, 1, ["one", "two"])


@pytest.mark.parametrize("parallel", [False, True])
def test_steps_of_a_model_in_training_have_no_dropout(parallel: bool) -> None:
    streams, got = TwoStreams(with_adapters(tiny(attention_dropout=0.5), lora_dropout=0.5)), []
    streams.model.gradient_checkpointing_enable()
    for training in (False, True):
        streams.model.train(training)
        streams.encode(tokens(1, 9), cache := EncoderCache())
        got.append([*streams.step(tokens(1, 1), cache, "one", parallel=parallel), *_kv(cache)])
        assert streams.model.training == training
    assert _equal(*got)


def test_parallel_step_leaves_the_model_as_it_was() -> None:
    streams = _adapted()
    streams.encode(ids := tokens(1, 9), cache := EncoderCache())
    want = streams.decode(ids, cache, "two")
    streams.step(ids[:, :1], cache.fork(), "one")
    assert not any("forward" in vars(m) for m in streams.model.modules())
    assert torch.equal(streams.decode(ids, cache, "two"), want)


# --------------------------------------------------------------------------------------------- 6: the cache


LAYERS = 2


class _Forks:
    """Forks of one cache beside plain concatenations of what was put into each."""

    def __init__(self) -> None:
        self.pairs = [(EncoderCache(), torch.empty(LAYERS, 0))]
        self.written = 0

    def append(self, which: int, rows: int, layers: int = LAYERS) -> None:
        cache, plain = self.pairs[which]
        new = torch.arange(LAYERS * rows).float().view(LAYERS, rows) + self.written
        self.written += LAYERS * rows
        for layer in range(layers):
            keys = new[layer].view(1, 1, rows, 1)
            got_k, got_v = cache.append(layer, keys.clone(), -keys)
            assert got_k.flatten().tolist() == [*plain[layer].tolist(), *new[layer].tolist()]
            assert torch.equal(got_v, -got_k)
        if layers == LAYERS:
            cache.length += rows
            self.pairs[which] = cache, torch.cat([plain, new], 1)

    def append_and_raise_midway(self, which: int, rows: int) -> None:
        self.append(which, rows, LAYERS - 1)

    def truncate(self, which: int, fewer: int) -> None:
        cache, plain = self.pairs[which]
        cache.truncate(length := max(0, cache.length - fewer))
        self.pairs[which] = cache, plain[:, :length]

    def fork(self, which: int, _: int) -> None:
        cache, plain = self.pairs[which]
        self.pairs.append((cache.fork(), plain))

    def check(self) -> None:
        for cache, plain in self.pairs:
            assert cache.length == plain.shape[1]
            if cache.layers == LAYERS:
                assert cache.bytes == LAYERS * cache.length * 2 * 4
                for layer in range(LAYERS):
                    keys, values = cache.layer(layer)
                    assert keys.flatten().tolist() == plain[layer].tolist()
                    assert torch.equal(values, -keys)


_ACTS = st.sampled_from(["append", "append", "append_and_raise_midway", "truncate", "fork"])


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(_ACTS, st.integers(0, 20), st.integers(1, 5)), min_size=8, max_size=20))
def test_forks_never_disturb_one_another(acts: list[tuple[str, int, int]]) -> None:
    forks = _Forks()
    for act, which, rows in acts:
        getattr(forks, act)(which % len(forks.pairs), rows)
        forks.check()


def _append_in_place_always(cache: EncoderCache, layer: int, keys: Tensor, values: Tensor) -> Any:
    if layer in cache._buffers:
        cache._buffers[layer].used = cache.length
    return _APPEND(cache, layer, keys, values)


def _truncate_ignores_sharing(cache: EncoderCache, length: int) -> None:
    cache.length = min(cache.length, length)
    for buffer in cache._buffers.values():
        buffer.used = min(buffer.used, cache.length)


def _append_advances(cache: EncoderCache, layer: int, keys: Tensor, values: Tensor) -> Any:
    got = _APPEND(cache, layer, keys, values)
    cache.length += keys.shape[2] if layer == LAYERS - 2 else 0
    return got


_APPEND = EncoderCache.append


@pytest.mark.parametrize(
    ("method", "mutant"),
    [("append", _append_in_place_always), ("truncate", _truncate_ignores_sharing), ("append", _append_advances)],
)
def test_that_fork_test_sees_a_cache_without_its_guards(
    method: str, mutant: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EncoderCache, method, mutant)
    with pytest.raises((AssertionError, RuntimeError)):
        test_forks_never_disturb_one_another()


def test_fork_copies_nothing_until_the_two_diverge() -> None:
    streams, ids = _adapted(), tokens(1, 10)
    streams.encode(ids, cache := EncoderCache())
    streams.encode(ids[:, :1], cache)  # now in a buffer with room
    twin = cache.fork()

    def places(of: EncoderCache) -> list[int]:
        return [t.data_ptr() for t in _kv(of)]

    origin, before = places(cache), [t.clone() for t in _kv(cache)]
    assert places(twin) == origin
    streams.encode(ids[:, :1], twin)  # the first to append behind the last position does it in place
    assert places(twin) == origin == places(cache)
    streams.encode(ids[:, 1:2], cache)
    assert not set(places(cache)) & set(origin)
    assert _equal([t[:, :, :11] for t in _kv(cache)], before)
    assert _equal([t[:, :, :11] for t in _kv(twin)], before)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_what_is_held_after_prefill_is_what_is_counted(family: str) -> None:
    _adapted(family).encode(tokens(1, 10), cache := EncoderCache())
    assert sum(t.untyped_storage().nbytes() for t in _kv(cache)) == cache.bytes == 3 * 2 * 2 * 16 * 4 * 10


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_pass_that_raises_midway_leaves_the_contents(parallel: bool, layer: int) -> None:
    streams, ids = _adapted(), tokens(1, 10)

    def conversation(fails: bool) -> list[Tensor]:
        streams.encode(ids, cache := EncoderCache())
        if fails:
            held = [t.clone() for t in _kv(cache)]
            broken = streams.model.get_base_model().model.layers[layer].mlp.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                streams.step(ids[:, :1], cache, "one", parallel=parallel)
            broken.remove()
            assert cache.length == 10
            assert _equal(_kv(cache), held)
        logits, base = streams.step(ids[:, 1:2], cache, "one", parallel=parallel)
        return [logits, base, *_kv(cache)]

    assert _equal(conversation(fails=True), conversation(fails=False))


def test_a_first_pass_that_raises_can_be_repeated() -> None:
    streams, cache, want = _adapted(), EncoderCache(), EncoderCache()
    broken = streams.model.get_base_model().model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        streams.encode(tokens(1, 10), cache)
    broken.remove()
    for each in (cache, want):
        streams.encode(tokens(1, 12), each)
    assert _equal(_kv(cache), _kv(want))


# ----------------------------------------------------------------------------------------------- 7: refusals

_SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
_HYBRID = {**_SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("family", "config", "why"),
    [
        ("mamba", {**_SMALL, "state_size": 4}, "mamba.*no KV cache"),
        (
            "qwen3_next",
            {
                **_HYBRID,
                "layer_types": ["linear_attention", "full_attention"],
                "num_experts": 2,
                "num_experts_per_tok": 1,
            },
            "qwen3_next.*no KV cache.*linear_attention",
        ),
        (
            "jamba",
            {**_HYBRID, "attn_layer_offset": 1, "attn_layer_period": 2, "use_mamba_kernels": False},
            "jamba.*no KV cache",
        ),
        ("lfm2", {**_HYBRID, "layer_types": ["conv", "full_attention"]}, "lfm2.*no KV cache.*conv"),
    ],
)
def test_state_that_is_no_kv_cache_is_refused(family: str, config: dict[str, Any], why: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config))
    with pytest.raises(UnsupportedModelError, match=why):
        TwoStreams(model)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders_are_refused(family: str) -> None:
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    small = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16}
    if family == "bart":
        small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = AutoConfig.for_model(family, vocab_size=VOCAB, **small)
    with pytest.raises(UnsupportedModelError, match=f"{family}.*decoder-only"):
        TwoStreams(AutoModelForSeq2SeqLM.from_config(config))


@pytest.mark.parametrize("kind", ["flash_attention_2", "flex_attention"])
def test_attention_without_a_mask_of_ours_is_refused(kind: str) -> None:
    model = tiny()
    model.config._attn_implementation_internal = kind
    with pytest.raises(UnsupportedModelError, match=f"{kind}.*sdpa"):
        TwoStreams(model)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("make", [_adapted, lambda: TwoStreams(tiny())], ids=["adapters", "bare"])
def test_an_unknown_adapter_is_refused_by_name(make: Callable[[], TwoStreams], parallel: bool) -> None:
    streams = make()
    streams.encode(tokens(1, 5), cache := EncoderCache())
    for call in (
        lambda: streams.decode(tokens(1, 1), cache, "three"),
        lambda: streams.step(tokens(1, 1), cache, "three", parallel=parallel),
    ):
        with pytest.raises(InputError, match="'three'"):
            call()
        assert cache.length == 5


# --------------------------------------------------------------------------------------- 8: rows with loss


@st.composite
def _training_rows(draw: Any) -> Batch:
    """Rows of packed documents, some with completions on a shared prompt, padded on either side."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row: list[tuple[int, int, int]] = []
        for _ in range(draw(st.integers(1, 3))):
            trunk = draw(st.integers(1, 5))
            row += [(position, 0, 1) for position in range(trunk)]
            for branch in range(1, 1 + draw(st.integers(0, 3))):
                row += [(trunk + i, branch, 1) for i in range(draw(st.integers(1, 4)))]
        rows.append(row)
    width, left = max(map(len, rows)), draw(st.booleans())
    padded = [[(0, 0, 0)] * (width - len(r)) + r if left else r + [(0, 0, 0)] * (width - len(r)) for r in rows]
    position, branch, real = torch.tensor(padded).unbind(-1)
    ids = torch.arange(position.numel()).view(position.shape)
    carries = torch.tensor(draw(st.lists(st.booleans(), min_size=ids.numel(), max_size=ids.numel()))).view(ids.shape)
    return Batch.of(ids, torch.where(carries & real.bool(), ids, IGNORED), real, position, branch)


def _naive(batch: Batch, row: int) -> list[tuple[int, int]]:
    """(predicting position, token) by walking each document by hand."""
    labels, parent_of_branch, last_of_trunk = [], -1, -1
    previous = 0
    for at in range(batch.input_ids.shape[1]):
        if batch.document_ids[row, at] < 0:
            continue
        branch, start = int(batch.branch_ids[row, at]), int(batch.position_ids[row, at]) == 0
        if branch == 0:
            parent, last_of_trunk = (-1 if start else last_of_trunk), at
        else:
            parent = parent_of_branch if branch == previous else last_of_trunk
        parent_of_branch, previous = at, branch
        if parent >= 0 and batch.labels[row, at] != IGNORED:
            labels.append((parent, int(batch.labels[row, at])))
    return labels


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(_training_rows())
def test_rows_with_loss_against_a_naive_loop(batch: Batch) -> None:
    rows, targets = batch.rows_with_loss()
    for row in range(len(rows)):
        got = [(int(r), int(t)) for r, t in zip(rows[row], targets[row], strict=True) if t != IGNORED]
        assert got == _naive(batch, row)
    assert rows.shape[1] == max(1, *(len(_naive(batch, row)) for row in range(len(rows))), 1)


def test_branches_without_positions_are_refused() -> None:
    ids = tokens(1, 6)
    with pytest.raises(InputError, match="position_ids"):
        Batch.of(ids, ids, branch_ids=torch.tensor([[0, 0, 1, 1, 2, 2]]))


def test_a_batch_without_loss_is_zero_and_has_no_gradient_of_its_own() -> None:
    ids = tokens(2, 6)
    total, _, targets = _adapted().loss(Batch.of(ids, torch.full_like(ids, IGNORED)))
    assert float(total.detach()) == 0
    assert (targets == IGNORED).all()


@pytest.mark.parametrize(
    ("lora_settings", "why"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, r"layers\.0\.self_attn\.v_proj .* feeds K or V"),
        ({"use_dora": True}, "not plain LoRA"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "same embeddings"),
    ],
)
def test_adapters_that_two_streams_cannot_have_are_refused(lora_settings: dict[str, Any], why: str) -> None:
    streams = TwoStreams(with_adapters(tiny(), ["one"], **lora_settings))
    with pytest.raises(UnsupportedModelError, match=why):
        streams.encode(tokens(1, 4), EncoderCache())


def test_an_adapter_merged_into_the_base_is_refused() -> None:
    streams = _adapted()
    streams.encode(tokens(1, 4), cache := EncoderCache())
    streams.model.merge_adapter()
    for run in (lambda: streams.encode(tokens(1, 1), cache), lambda: streams.step(tokens(1, 1), cache, "one")):
        with pytest.raises(UnsupportedModelError, match="merged"):
            run()
    assert cache.length == 4


def test_an_adapter_attached_in_evaluation_mode_has_no_dropout() -> None:
    streams = TwoStreams(with_adapters(tiny(), ["one"], lora_dropout=0.5).eval())
    streams.encode(tokens(1, 9), cache := EncoderCache())
    with_adapters(streams.model, ["two"], lora_dropout=0.5, target_modules=["q_proj", "down_proj"])
    streams.model.training = False  # as PEFT leaves it: the model evaluates, its new layers do not
    assert torch.equal(*(streams.decode(tokens(1, 1), cache, "two") for _ in range(2)))


@all_families
def test_probe_passes_models_whose_rows_can_be_picked(family: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        TwoStreams(with_adapters(tiny(family, dtype=dtype))).probe()


def test_probe_refuses_a_model_that_takes_rows_for_positions() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gpt_neo",
        vocab_size=128,
        hidden_size=64,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        window_size=3,
        num_heads=4,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    with pytest.raises(UnsupportedModelError, match="GPTNeoForCausalLM does not give its own logits"):
        TwoStreams(model).probe()


@pytest.mark.parametrize(
    ("documents", "plain"),
    [([[1, 1, 1]], True), ([[-1, 1, 1], [1, 1, -1]], True), ([[1, 2, 2]], False), ([[0, 0, 1]], False)],
)
def test_a_batch_is_plain_if_each_row_is_one_document(documents: list[list[int]], plain: bool) -> None:
    ids = torch.zeros(len(documents), 3, dtype=torch.long)
    batch = Batch(
        input_ids=ids,
        labels=ids,
        position_ids=ids,
        document_ids=torch.tensor(documents),
        branch_ids=torch.zeros_like(ids),
    )
    assert batch.is_plain == plain


@all_families
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_loss_on_most_tokens_equals_decoder_rows_everywhere(family: str, padding: str) -> None:
    ids, mask = tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
    if padding != "none":
        mask[1, slice(0, 3) if padding == "left" else slice(-3, None)] = 0
    labels = torch.where(mask.bool(), ids, IGNORED)
    labels[1, 4:8] = IGNORED
    batch, got = Batch.of(ids, labels, mask), []
    assert batch.rows_with_loss()[0].shape[1] > under_test._NEARLY_ALL * 14
    for everywhere in (False, True):
        streams = _adapted(family)
        loss, _, targets = _loss(streams, batch, everywhere)
        loss.backward()
        gradients = [p.grad for p in streams.model.parameters() if p.grad is not None]
        got.append((loss, (targets != IGNORED).sum(), gradients))
    torch.testing.assert_close(*got, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------- padded sequences


@both_attentions
@all_families
def test_sequences_padded_on_the_left_are_as_each_alone(family: str, attention: str) -> None:
    model = with_adapters(tiny(family, attention=attention), ["one"])
    streams, lengths = TwoStreams(model), [9, 3, 1]
    ids, width = tokens(3, 12), 9
    rows = torch.stack([torch.nn.functional.pad(row[:n], (width - n, 0)) for row, n in zip(ids, lengths, strict=True)])
    padded = EncoderCache(padding=width - torch.tensor(lengths))
    encoded = streams.encode(rows, padded)
    for n, row, base in zip(lengths, ids, encoded, strict=True):
        alone = EncoderCache()
        assert torch.allclose(streams.encode(row[None, :n], alone)[0], base, atol=1e-4)
    for parallel in (True, False):
        twin = padded.fork()
        for step in range(3):
            token = torch.stack([row[n + step] for row, n in zip(ids, lengths, strict=True)])[:, None]
            decoder, base = streams.step(token, twin, "one", parallel=parallel)
        for i, (n, row) in enumerate(zip(lengths, ids, strict=True)):
            alone = EncoderCache()
            wanted = streams.encode(row[None, : n + 3], alone)
            assert torch.allclose(base[i], wanted[0, -1], atol=1e-4)
            assert torch.allclose(decoder[i], streams.decode(row[None, n + 2 : n + 3], alone, "one")[0, -1], atol=1e-4)
