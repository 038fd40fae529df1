"""Targets and ranks mean what they mean to PEFT."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key

from icarus import adapter
from icarus.adapter import settings
from specimens import llama, setting, specialist

MODULES = [name for name, _ in llama().named_modules() if "proj" in name] + ["model.layers.0.mlp.experts.1.up_proj"]


@given(
    targets=st.one_of(
        st.lists(st.sampled_from(["o_proj", "mlp.up_proj", "proj", *MODULES[:3]]), min_size=1),
        st.sampled_from([r".*o_proj", r"model\.layers\.1\..*", "o_proj"]),
    ),
    exclude=st.sampled_from([None, [], ["o_proj"], r".*layers\.0.*"]),
    layers=st.sampled_from([None, [], 0, [1], [0, 1]]),
    pattern=st.sampled_from([None, [], "layers", ["h", "layers"], ["experts"]]),
    module=st.sampled_from(MODULES),
)
def test_targets_match_as_in_peft(targets: Any, exclude: Any, layers: Any, pattern: Any, module: str) -> None:
    if isinstance(targets, str) or layers is None:
        layers = pattern = None
    fields = {"target_modules": targets, "exclude_modules": exclude}
    fields |= {"layers_to_transform": layers, "layers_pattern": pattern}
    match = check_target_module_exists(LoraConfig(**fields), module)
    assert settings.targeted(fields, module) == (bool(match) and not isinstance(match, _ExcludedModule))


KEYS = [
    "o_proj",
    "self_attn.o_proj",
    "proj",
    r"layers\.1\..*",
    r".*\.layers\.0\.mlp\.\w+",
    "model",
    r"^model\..*up_proj",
]


@given(
    ranks=st.dictionaries(st.sampled_from(KEYS), st.integers(1, 9)),
    module=st.sampled_from(MODULES),
    order=st.randoms(use_true_random=False),
)
def test_ranks_are_looked_up_as_in_peft(ranks: dict[str, int], module: str, order: Any) -> None:
    keys = list(ranks)
    order.shuffle(keys)
    pattern = {key: ranks[key] for key in keys}
    config = {"r": 16, "rank_pattern": pattern}
    assert settings.rank_of(config, module) == pattern.get(get_pattern_key(keys, module), 16)
    assert settings.highest_rank(config) == 16
    assert settings.highest_rank({**config, "r": 1}) == max(pattern.values(), default=1)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"])
@pytest.mark.parametrize("shares", [True, False])
def test_a_regular_expression_without_an_end_is_refused(
    field: str, shares: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "_MATCH_S", 0.01)
    llama().save_pretrained(tmp_path / "base")
    folder = adapter.save(specialist(llama()), tmp_path / "adapter")
    endless = r"((.|\w)*)*\d\d\d\d"
    fields = {"rank_pattern": {endless: 4}, "layers_pattern": [endless], "layers_to_transform": [0]}
    setting(**{name: fields.get(name, endless) for name in {field, "layers_to_transform"}})(folder)
    if field != "layers_pattern":
        setting(layers_to_transform=None)(folder)
    problems = adapter.problems if shares else adapter.conventional_problems
    assert settings.SLOW in problems(folder, tmp_path / "base")
