"""bfloat16 at the speed of float32: the same values, but for the order of sums."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.accuracy import bfloat16
from icarus import processor


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``speed_up`` replaces comes back behind each test."""
    monkeypatch.setattr(nn.Linear, "forward", nn.Linear.forward)
    monkeypatch.setattr(F, "scaled_dot_product_attention", F.scaled_dot_product_attention)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "slow_in_bfloat16", lambda: True)
    bfloat16.speed_up()


def _whole(*shape: int) -> Tensor:
    """Whole numbers, whose products and sums are exact in any order."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def _linear(bias: bool, trained: bool) -> nn.Linear:
    layer = nn.Linear(6, 5, bias=bias).bfloat16().requires_grad_(trained)
    with torch.no_grad():
        layer.weight.copy_(_whole(5, 6))
        if bias:
            layer.bias.copy_(_whole(5))
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.usefixtures("slow")
def test_a_layer_and_its_gradients_are_bitwise_what_torch_computes(bias: bool, trained: bool) -> None:
    layer, x = _linear(bias, trained), _whole(2, 3, 6).requires_grad_()
    usual = F.linear(x, layer.weight, layer.bias)
    inputs = [x, *(parameter for parameter in layer.parameters() if trained)]
    wanted = torch.autograd.grad(usual, inputs, _whole(2, 3, 5))
    own = layer(x)
    assert own.dtype == torch.bfloat16
    assert torch.equal(own, usual)
    for one, other in zip(torch.autograd.grad(own, inputs, _whole(2, 3, 5)), wanted, strict=True):
        assert one.dtype == torch.bfloat16
        assert torch.equal(one, other)


@pytest.mark.usefixtures("slow")
def test_weights_that_were_changed_in_place_are_seen() -> None:
    layer, x = _linear(bias=False, trained=False), _whole(3, 6)
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(layer(x), 2 * before)


@pytest.mark.usefixtures("slow")
def test_weights_are_converted_once_where_nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, convert = _linear(bias=False, trained=True), _whole(3, 6), Mock(side_effect=bfloat16._converted)
    monkeypatch.setattr(bfloat16, "_converted", convert)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x))
    assert convert.call_count == 1


@pytest.mark.usefixtures("slow")
def test_attention_is_within_the_rounding_of_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 9, 8, generator=generator).bfloat16().unbind()
    exact = bfloat16._attention(query.double(), key.double(), value.double(), is_causal=True)
    own = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert own.dtype == torch.bfloat16
    torch.testing.assert_close(own.double(), exact, rtol=2**-8, atol=1e-5)


def test_nothing_is_replaced_where_the_processor_has_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    before = nn.Linear.forward, F.scaled_dot_product_attention
    monkeypatch.setattr(processor, "slow_in_bfloat16", lambda: False)
    bfloat16.speed_up()
    assert (nn.Linear.forward, F.scaled_dot_product_attention) == before
