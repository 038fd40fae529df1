"""An encoder adapter and decoders that are trained at once."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from experiments.accuracy import bases, settings
from experiments.accuracy.bases import ENCODER, Joint
from icarus.streams import IGNORED, Batch
from tiny_models import tiny, tokens


def _joint() -> Joint:
    torch.manual_seed(0)
    joint = Joint(tiny("llama"), ["one", "two"], 4)
    for parameter in joint.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return joint


def _rows(*loss_tokens: int) -> list[Batch]:
    """Rows of 12 tokens, the last ones of which carry loss."""
    rows = []
    for row, count in enumerate(loss_tokens):
        ids = tokens(1, 12, seed=row)
        labels = torch.full_like(ids, IGNORED)
        labels[:, -count:] = ids[:, -count:]
        rows.append(Batch.of(ids, labels))
    return rows


def _gradients(joint: Joint) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in joint.model.named_parameters() if p.grad is not None and p.grad.any()}


def test_gradients_reach_the_encoder_through_k_and_v_and_one_decoder() -> None:
    joint = _joint()
    joint.backward("one", _rows(4))
    grads = _gradients(joint)
    assert {name.split(".")[-2] for name in grads} == {ENCODER, "one"}
    written = {name.split(".")[-4] for name in grads if name.split(".")[-2] == ENCODER}
    assert {"k_proj", "v_proj"} <= written


def test_a_batch_in_parts_is_the_batch() -> None:
    one, other = _rows(2, 7)
    whole = Batch.of(torch.cat([one.input_ids, other.input_ids]), torch.cat([one.labels, other.labels]))
    joint, parts = _joint(), _joint()
    loss = joint.backward("two", [whole])
    assert abs(parts.backward("two", [one, other]) - loss) < 1e-5
    want, got = _gradients(joint), _gradients(parts)
    assert want.keys() == got.keys()
    assert all(torch.allclose(got[name], want[name], atol=1e-5) for name in want)


def test_a_base_is_merged_under_the_name_that_its_adapter_was_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else merging refuses the adapter as one of another base model, at the end of its training."""
    load, run = Mock(return_value=(None, None)), Mock()
    monkeypatch.setattr(bases.base_model, "folder", lambda base: tmp_path / base)
    monkeypatch.setattr(bases.base_model, "load", load)
    monkeypatch.setattr(bases.training, "run", run)
    monkeypatch.setattr(bases.adapter, "merge", lambda *_: None)
    monkeypatch.setattr(bases, "_save", lambda *_: None)
    chosen = settings.read(Path(bases.__file__).with_name("forms.yaml"))
    bases.merged(chosen, tmp_path / "rows", tmp_path / "adapter", tmp_path / "base")
    trained, merged = run.call_args.args[1].base, load.call_args.args[0]
    assert trained == merged == str(tmp_path / chosen.base)
