"""An encoder adapter and decoders that are trained at once."""

from __future__ import annotations

import torch
from torch import Tensor

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
