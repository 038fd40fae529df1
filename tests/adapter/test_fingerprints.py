"""The fingerprint is the same for every form of the same base weights, and another for any other weights."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from icarus.adapter import fingerprints as module
from icarus.adapter.fingerprints import checkpoint_shapes, fingerprint
from icarus.errors import InputError

hf: Any = transformers  # its model classes are untyped


def llama(seed: int = 0, tied: bool = False) -> Any:
    torch.manual_seed(seed)
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )


def qwen3_moe() -> Any:
    torch.manual_seed(0)
    return hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )


def gpt2() -> Any:
    torch.manual_seed(0)
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32))


@pytest.mark.parametrize("build", [llama, qwen3_moe, gpt2])
def test_memory_equals_folder(build: Callable[[], Any], tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    assert fingerprint(model) == fingerprint(tmp_path) == fingerprint(hf.AutoModelForCausalLM.from_pretrained(tmp_path))


def test_merged_experts_are_compared_as_the_checkpoint_stores_them(tmp_path: Path) -> None:
    model = qwen3_moe()
    model.save_pretrained(tmp_path)
    assert any(p.dim() == 3 for p in model.parameters())
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in checkpoint_shapes(tmp_path)
    before = fingerprint(model)
    next(p for p in model.parameters() if p.dim() == 3).data[3, 0, 0] += 1
    assert fingerprint(model) != before


def test_dtype_sharding_and_order_do_not_count(tmp_path: Path) -> None:
    model = llama()
    expected = fingerprint(model)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert fingerprint(tmp_path / "shards") == expected
    model.save_pretrained(tmp_path / "float32")
    tensors = load_file(tmp_path / "float32" / "model.safetensors")
    (tmp_path / "reversed").mkdir()
    save_file(dict(reversed(tensors.items())), tmp_path / "reversed" / "model.safetensors")
    assert fingerprint(tmp_path / "reversed") == expected
    model.to(torch.bfloat16)
    assert fingerprint(model) == expected
    model.save_pretrained(tmp_path / "bfloat16")
    assert fingerprint(tmp_path / "bfloat16") == expected


def test_tied_head_may_be_stored_or_not(tmp_path: Path) -> None:
    model = llama(tied=True)
    model.save_pretrained(tmp_path)
    expected = fingerprint(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    assert fingerprint(tmp_path) == fingerprint(model) == expected


def test_other_tied_weights_count_once(tmp_path: Path) -> None:
    model = llama()
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
    model._tied_weights_keys = model.all_tied_weights_keys = {names[1]: names[0]}
    model.save_pretrained(tmp_path)
    assert names[1] not in checkpoint_shapes(tmp_path)
    assert fingerprint(model) == fingerprint(tmp_path)


@pytest.mark.parametrize("limit", [10, 10**9])
def test_tied_head_in_memory_may_be_a_copy(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FULL_HASH_LIMIT", limit)
    model, copied = llama(tied=True), llama()
    copied.load_state_dict(model.state_dict())
    assert fingerprint(copied) == fingerprint(model)


def test_stored_head_does_not_decide_on_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tied, untied = llama(tied=True), llama()
    untied.load_state_dict(tied.state_dict())
    for name, model in (("tied", tied), ("untied", untied)):
        model.save_pretrained(tmp_path / name)
    elements = tied.num_parameters()
    assert untied.num_parameters() > elements
    monkeypatch.setattr(module, "FULL_HASH_LIMIT", elements)
    monkeypatch.setattr(module, "SAMPLE_RUN", 4)
    marks = {fingerprint(source) for source in (tied, untied, tmp_path / "tied", tmp_path / "untied")}
    monkeypatch.setattr(module, "FULL_HASH_LIMIT", elements - 1)
    assert len(marks) == 1
    assert fingerprint(tied) not in marks


def test_checkpoint_of_the_bare_decoder_is_the_same_base(tmp_path: Path) -> None:
    model = llama(tied=True)
    model.model.save_pretrained(tmp_path)
    assert "layers.0.self_attn.k_proj.weight" in checkpoint_shapes(tmp_path)
    assert fingerprint(tmp_path) == fingerprint(model)


def test_every_weight_counts(tmp_path: Path) -> None:
    model = llama()
    seen = {fingerprint(model)}
    weights = dict(model.named_parameters())
    assert "lm_head.weight" in weights
    for name, weight in weights.items():
        weight.data.view(-1)[-1] += 0.5
        seen.add(fingerprint(model))
        model.save_pretrained(tmp_path / name)
        assert fingerprint(tmp_path / name) in seen
    assert len(seen) == len(weights) + 1


def test_names_count() -> None:
    model = llama()
    before = fingerprint(model)
    first, second = (layer.mlp.up_proj.weight for layer in model.model.layers)
    first.data, second.data = second.data, first.data
    assert fingerprint(model) != before


def test_shapes_count(tmp_path: Path) -> None:
    marks = []
    for shape in ((2, 3), (3, 2)):
        save_file({"weight": torch.ones(shape)}, tmp_path / "model.safetensors")
        module._of_files.cache_clear()
        marks.append(fingerprint(tmp_path))
    assert marks[0] != marks[1]


@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning:peft")  # for each adapter of a layer but one
def test_adapters_do_not_count_and_merged_ones_are_refused() -> None:
    model = llama()
    expected = fingerprint(model)
    peft_model: Any = get_peft_model(model, LoraConfig(target_modules=["o_proj"], init_lora_weights=False))
    peft_model.add_adapter("second", LoraConfig(target_modules=["up_proj", "o_proj"], init_lora_weights=False))
    assert fingerprint(peft_model) == fingerprint(model) == expected
    peft_model.merge_adapter()
    with pytest.raises(InputError, match="unmerge_adapter"):
        fingerprint(peft_model)
    peft_model.unmerge_adapter()
    assert fingerprint(peft_model) == expected


def test_modules_to_save_do_not_count() -> None:
    model = llama()
    expected = fingerprint(model)
    peft_model = get_peft_model(model, LoraConfig(target_modules=["o_proj"], modules_to_save=["norm"]))
    for name, weight in peft_model.named_parameters():
        if "modules_to_save" in name:
            weight.data += 1
    assert fingerprint(peft_model) == expected


def test_buffers_outside_the_checkpoint_do_not_count(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    expected = fingerprint(tmp_path)
    model.model.register_buffer("scratch", torch.ones(3), persistent=False)
    assert fingerprint(model) == expected
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file)
    assert fingerprint(tmp_path) == expected


def test_integers_and_unknown_types_are_hashed_as_bytes(tmp_path: Path) -> None:
    codes = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    model = nn.Module()
    model.register_buffer("codes", codes)
    model.register_buffer("scale", torch.ones(2))
    save_file({"codes": codes, "scale": torch.ones(2)}, tmp_path / "model.safetensors")
    assert fingerprint(model) == fingerprint(tmp_path)
    codes[0, 0] = 7
    assert fingerprint(model) != fingerprint(tmp_path)


def test_large_models_are_sampled_alike_in_memory_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(500, 400))
    save_file({"weight": model.weight.data}, tmp_path / "model.safetensors")
    full = fingerprint(model)
    monkeypatch.setattr(module, "FULL_HASH_LIMIT", 1000)
    module._of_files.cache_clear()
    sampled = fingerprint(model)
    assert sampled == fingerprint(tmp_path) != full
    read = [at for start, stop in module._ranges(200_000, full=False) for at in (start, stop - 1)]
    assert (read[0], read[-1], len(read)) == (0, 199_999, 128)
    flat = model.weight.data.view(-1)
    flat[2000] += 1  # the stated limit: between two runs a change is not seen
    assert fingerprint(model) == sampled
    for at in (0, read[40], 199_999):
        flat[at] += 1
        assert fingerprint(model) != sampled
        flat[at] -= 1


def test_folder_is_read_again_once_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(4)}, file)
    os.utime(file, ns=(0, 0))  # the clock of a file system may not tick between two writes
    before = fingerprint(tmp_path)
    save_file({"weight": torch.ones(4)}, file)
    assert fingerprint(tmp_path) != before


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no safetensors"),
        ({"adapter_model.safetensors": b""}, "holds no safetensors"),
        ({"model.safetensors": b"\x08"}, "not a complete safetensors"),
        ({"model.safetensors": b"\xff" * 16}, "header is longer"),
        ({"model.safetensors.index.json": b"{}"}, "not a safetensors index"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "one.safetensors"}}'}, "lacks one.safetensors"),
    ],
)
def test_unreadable_folder_is_named(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        fingerprint(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="ends before its last tensor"):
        fingerprint(tmp_path)


def test_weights_that_are_not_in_memory_are_refused() -> None:
    with torch.device("meta"):
        model = llama()
    with pytest.raises(InputError, match="not in memory"):
        fingerprint(model)


def test_folder_needs_no_modelling_code(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    code = (
        "import json, sys; from icarus.adapter.fingerprints import fingerprint; mark = fingerprint(sys.argv[1]);"
        "print(json.dumps([mark, 'transformers' in sys.modules, 'peft' in sys.modules]))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [fingerprint(tmp_path), False, False]
