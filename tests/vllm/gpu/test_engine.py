"""An engine that reads K/V once, on model runner V2 and with vLLM's Triton attention, by Triton's interpreter."""

from __future__ import annotations

from copy import copy

import pytest

from engines import Launcher, Shop, ask, of
from icarus.vllm.settings import READ_KV_ONCE
from strict_skips import needs_vllm
from tiny_models import tokens

pytestmark = [pytest.mark.engine, needs_vllm]

ONCE = {READ_KV_ONCE: True}
SHORT = [tokens(length, seed=900 + length).tolist() for length in (1, 9, 33)]


@pytest.fixture
def interpreted(shop: Shop, launcher_v2: Launcher) -> Shop:
    other = copy(shop)
    other.launcher = launcher_v2
    return other


def test_its_tokens_are_the_references(interpreted: Shop) -> None:
    asked = [(model, prompt) for prompt in SHORT for model in ("sql", "base", "chat")]
    steps = [{"count pairs": None}, ask(*asked, max_tokens=4), {"counted pairs": None}]
    _, replies, pairs = interpreted.serve(
        steps, triton_attention=True, additional_config=ONCE, max_num_batched_tokens=64
    )
    for (model, prompt), got in zip(asked, of(replies), strict=True):
        assert got == interpreted.reference(model, prompt, 4), (model, len(prompt))
    assert max(pairs) == 6, "all specialists decode"
    assert min(pairs) < 6


def test_another_backend_refuses_specialists_with_the_reason(shop: Shop) -> None:
    steps = [{"load": {"name": "sql"}}, ask(("base", SHORT[0]), max_tokens=1)]
    refused, served = shop.serve(steps, additional_config=ONCE)
    assert "cannot read K/V once" in refused["error"]
    assert "--attention-backend TRITON_ATTN, or leave --read-kv-once out" in refused["error"]
    assert of(served) == [shop.reference("base", SHORT[0], 1)]
