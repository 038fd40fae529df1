"""Conventional adapters: what vLLM would serve wrongly, or not at all, is refused with a reason; all else passes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from icarus import adapter
from icarus.errors import AdapterError
from specimens import (
    DAMAGES,
    O_PROJ,
    Damage,
    add_layer,
    both,
    drop_module,
    edit,
    gpt2,
    llama,
    phi3,
    qwen3_moe,
    rename,
    resize,
    setting,
    tensors,
)

LINEAR = "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj".split()


def plain(model: Any, folder: Path, **options: Any) -> Path:
    """A conventional adapter of rank 4 whose weights do something."""
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options)
    peft_model = get_peft_model(model, config)
    torch.manual_seed(3)
    for name, weight in peft_model.named_parameters():
        if ".lora_" in name:
            weight.data.normal_()
    return adapter.save_conventional(peft_model, folder)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return plain(llama(), tmp_path / "good", target_modules=LINEAR)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


def test_info(good: Path, base_folder: Path) -> None:
    info = adapter.verify_conventional(good, base_folder)
    file = load_file(good / "adapter_model.safetensors")
    size = sum(4 * tensor.numel() for tensor in file.values())
    assert info == adapter.ConventionalInfo(good, 4, tuple(LINEAR), size)


# What is in the table of damages and no harm to an adapter that has a cache of its own.
HARMLESS = {
    "no marker",
    "task type",
    "no task type",
    "k target",
    "path of v target",
    "regex target",
    "all-linear",
    "alpha negative",
    "alpha pattern of 0",
    "dropout",
    "dropout text",
    "dropout nan",
    "kv tensors",
    "pickle",
}
OF_THE_MARKER = {name for name in DAMAGES if name.startswith("marker")}
WITHOUT_A_BASE = {"untargeted", "excluded", "other layers"}  # only the base tells what targets mean to vLLM
WORDS = {
    "peft type": "peft_type is 'IA3'",
    "modules_to_save": r"modules_to_save is \['norm'\]",
    "alpha too large": "set it to a finite number",
    "alpha nan": "lora_alpha is nan",
    "pickle": "pickle",
    "target_parameters": "",
}


@pytest.mark.parametrize("damage", sorted(DAMAGES.keys() - HARMLESS - OF_THE_MARKER - {"target_parameters"}))
def test_damage_is_named(damage: str, good: Path, base_folder: Path) -> None:
    spoil, message = DAMAGES[damage]
    assert adapter.conventional_problems(good, base_folder) == []
    spoil(good)
    assert bool(adapter.conventional_problems(good)) is (damage not in WITHOUT_A_BASE)
    with pytest.raises(AdapterError, match=WORDS.get(damage, message)) as error:
        adapter.verify_conventional(good, base_folder)
    assert str(good) in str(error.value)
    assert "; " in adapter.conventional_problems(good, base_folder)[0], "reason; remedy"


@pytest.mark.parametrize("damage", sorted(HARMLESS - {"kv tensors", "pickle"}))
def test_what_needs_a_shared_cache_alone_is_no_reason(damage: str, good: Path, base_folder: Path) -> None:
    edit(lambda config: config.update(icarus={}))(good)
    DAMAGES[damage][0](good)
    assert adapter.conventional_problems(good, base_folder) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (tensors(resize), r"o_proj is \(32, 16\) here and \(32, 32\) in the base"),
        (tensors(drop_module), "weights of model.layers.0.self_attn.o_proj, which target_modules names, are missing"),
        (tensors(add_layer), "model.layers.7.self_attn.o_proj, which the base model lacks"),
        (
            tensors(lambda t: rename(t, "base_model.model.", "base_model.model.language_model.")),
            r"language_model.model.layers.0\S*, which the base model lacks",
        ),
        (
            tensors(lambda t: rename(t, "base_model.model.", "module.base_model.model.")),
            r"module.base_model.model.model.layers.0\S*, which the base model lacks",
        ),
        (tensors(lambda t: rename(t, ".lora_A.weight", ".lora_A.default.weight")), "is not a LoRA weight"),
        (setting(rank_pattern={"layers.0.self_attn.o_proj": 2}), "o_proj has rank 4 and the config says 2"),
        (setting(use_bdlora={"nblocks": 2}), "use_bdlora is set"),
        (setting(target_modules=["nothing"], target_parameters=None), "which target_modules does not name"),
    ],
)
def test_what_vllm_would_leave_out_or_apply_elsewhere(
    damage: Damage, message: str, good: Path, base_folder: Path
) -> None:
    damage(good)
    with pytest.raises(AdapterError, match=message):
        adapter.verify_conventional(good, base_folder)


@pytest.mark.parametrize("suffix", ["bin", "pt"])
def test_pickles_are_read_as_vllm_reads_them(suffix: str, good: Path, base_folder: Path) -> None:
    stored = load_file(good / "adapter_model.safetensors")
    torch.save(stored, good / f"adapter_model.{suffix}")
    (good / "adapter_model.safetensors").unlink()
    assert adapter.conventional_problems(good, base_folder) == []
    stored[f"{O_PROJ}.lora_A.weight"][0, 0] = float("inf")
    torch.save(stored, good / f"adapter_model.{suffix}")
    assert "infinity" in adapter.conventional_problems(good, base_folder)[0]


def not_finite_in(dtype: torch.dtype, pattern: int) -> Callable[[dict[str, Tensor]], None]:
    """One element of a tensor of K, of a type in which these bits are NaN or infinity."""

    def change(found: dict[str, Tensor]) -> None:
        name = next(name for name in found if "k_proj.lora_B" in name)
        found[name] = found[name].to(dtype)
        found[name].view({1: torch.uint8, 2: torch.int16, 8: torch.int64}[dtype.itemsize])[0, 0] = pattern

    return change


@pytest.mark.parametrize(
    ("dtype", "pattern"),
    [
        (torch.float8_e4m3fn, 0x7F),
        (torch.float8_e5m2, 0x7C),
        (torch.bfloat16, -0x80),
        (torch.float64, 0x7E37E43C8800759C),
    ],
    ids=["NaN in 8 bits", "infinity in 8 bits", "minus infinity in 16 bits", "1e300 in 64 bits"],
)
def test_values_that_are_not_finite_in_types_of_other_widths(
    dtype: torch.dtype, pattern: int, good: Path, base_folder: Path
) -> None:
    tensors(not_finite_in(dtype, pattern))(good)
    (problem,) = adapter.conventional_problems(good, base_folder)
    assert "k_proj.lora_B.weight holds NaN or infinity" in problem


class Code:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize("content", [Code(), [1], {"a": 1}])
def test_pickles_of_something_else(content: object, good: Path) -> None:
    (good / "adapter_model.safetensors").unlink()
    torch.save(content, good / "adapter_model.bin")
    (problem,) = adapter.conventional_problems(good)
    assert "save it as adapter_model.safetensors" in problem


def test_embeddings_and_head(tmp_path: Path, base_folder: Path) -> None:
    directory = plain(llama(), tmp_path / "wide", target_modules=["q_proj", "embed_tokens", "lm_head"])
    assert adapter.conventional_problems(directory, base_folder) == []
    copies = {f"base_model.model.{name}.base_layer.weight": torch.ones(2) for name in ("model.embed_tokens", "lm_head")}
    tensors(lambda t: t.update(copies))(directory)
    assert adapter.conventional_problems(directory, base_folder) == [], "vLLM skips copies of base weights"
    llama(vocab_size=80).save_pretrained(tmp_path / "larger")
    reasons = adapter.conventional_problems(directory, tmp_path / "larger")
    assert any(r"model.embed_tokens is (64, 32) here and (80, 32) in the base" in problem for problem in reasons)
    assert any(r"lm_head is (64, 32) here" in problem for problem in reasons)
    tensors(lambda t: rename(t, "lora_embedding_A", "lora_A.weight"))(directory)
    assert any("embed_tokens is an embedding" in problem for problem in adapter.conventional_problems(directory))


def test_names_of_fused_projections(good: Path, base_folder: Path) -> None:
    """vLLM reads no targets: a config that names its fused projections is served by the tensors."""
    setting(target_modules=["qkv_proj", "gate_up_proj", "o_proj", "down_proj"])(good)
    assert adapter.conventional_problems(good, base_folder) == []


@pytest.mark.parametrize("targets", [["nowhere"], ["W_pack"], ["attention", "o_proj"], ["nowhere\ud800"]])
def test_targets_that_the_base_model_lacks(targets: list[str], good: Path, base_folder: Path) -> None:
    """Other names than those of its weights; PEFT takes names of modules that are not there beside those that are."""
    setting(target_modules=targets)(good)
    assert "which target_modules does not name" in adapter.conventional_problems(good, base_folder)[0]
    setting(target_modules=[*targets, *LINEAR])(good)
    assert adapter.conventional_problems(good, base_folder) == []


@pytest.mark.parametrize("name", [None, 1, ["q_proj"], 0])
def test_targets_that_are_no_names(name: object, good: Path, base_folder: Path) -> None:
    setting(target_modules=[*LINEAR, name])(good)
    (problem, *_) = adapter.conventional_problems(good, base_folder)
    assert "a target field holds neither names nor" in problem


def test_names_without_pefts_prefix(good: Path, base_folder: Path) -> None:
    tensors(lambda t: rename(t, "base_model.model.", ""))(good)
    assert adapter.conventional_problems(good, base_folder) == []


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")  # PEFT's own keys
@pytest.mark.parametrize("build", [phi3, gpt2, qwen3_moe])
def test_other_models(build: Callable[[], Any], tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "base")
    directory = plain(build(), tmp_path / "adapter")
    assert adapter.conventional_problems(directory, tmp_path / "base") == []
    tensors(drop_one)(directory)
    assert "are missing" in adapter.conventional_problems(directory, tmp_path / "base")[0]


def drop_one(stored: dict[str, Tensor]) -> None:
    module = next(iter(stored)).rpartition(".lora_")[0]
    for half in "AB":
        del stored[f"{module}.lora_{half}.weight"]


def test_fused_experts(tmp_path: Path) -> None:
    """PEFT keeps the experts of a layer in one pair, whose ranks are those of all together."""
    qwen3_moe().save_pretrained(tmp_path / "base")
    directory = plain(qwen3_moe(), tmp_path / "adapter", target_modules=["q_proj"])
    experts = "base_model.model.model.layers.1.mlp.experts"
    pair = {f"{experts}.lora_A.weight": torch.ones(16, 16), f"{experts}.lora_B.weight": torch.ones(32, 16)}
    both(tensors(lambda t: t.update(pair)), setting(target_parameters=["mlp.experts.down_proj"]))(directory)
    assert adapter.conventional_problems(directory, tmp_path / "base") == []
    setting(target_modules=None)(directory)
    assert adapter.conventional_problems(directory, tmp_path / "base") == []


def test_models_within_models_have_several_names(good: Path, base_folder: Path, tmp_path: Path) -> None:
    """Which of them vLLM knows, vLLM tells."""
    composite = tmp_path / "composite"
    composite.mkdir()
    file = load_file(base_folder / "model.safetensors")
    save_file({f"language_model.{name}": tensor for name, tensor in file.items()}, composite / "model.safetensors")
    config = json.loads((base_folder / "config.json").read_text())
    (composite / "config.json").write_text(json.dumps({"model_type": "unheard", "text_config": config}))
    assert adapter.conventional_problems(good, composite) == []
    (composite / "config.json").write_text(json.dumps({"model_type": "unheard"}))
    assert "which the base model lacks" in adapter.conventional_problems(good, composite)[0]
    (composite / "config.json").write_text(json.dumps({"model_type": "unheard", "quantization_config": {}}))
    assert adapter.conventional_problems(good, composite) == [], "headers of a quantised model do not tell"


def test_heads_of_classifiers(tmp_path: Path) -> None:
    directory = plain(llama(), tmp_path / "adapter", target_modules=["q_proj"])
    head = {"base_model.model.score.weight": torch.ones(2, 32)}
    both(tensors(lambda t: t.update(head)), setting(modules_to_save=["score"]))(directory)
    assert len(adapter.conventional_problems(directory)) == 2
    assert adapter.conventional_problems(directory, heads=True) == []
    setting(modules_to_save=["score", "norm"])(directory)
    assert "norm" in adapter.conventional_problems(directory, heads=True)[0]


def test_what_a_server_needs_to_know(tmp_path: Path, base_folder: Path) -> None:
    patterns = {"rank_pattern": {"layers.0.self_attn.o_proj": 6}, "alpha_pattern": {"o_proj": 3}}
    directory = plain(llama(), tmp_path / "adapter", target_modules=["q_proj", "o_proj"], **patterns)
    info = adapter.verify_conventional(directory, base_folder)
    assert (info.rank, info.patterns) == (6, ("rank_pattern", "alpha_pattern"))


def test_it_needs_neither_peft_nor_transformers(good: Path, base_folder: Path) -> None:
    code = (
        "import sys; from icarus import adapter; adapter.verify_conventional(sys.argv[1], sys.argv[2]);"
        "print([name for name in ('peft', 'transformers') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(good), str(base_folder)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"
