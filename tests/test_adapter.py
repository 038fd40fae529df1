"""The adapter directory: what is written is what is read, and nothing unsafe gets through in either direction."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from icarus import adapter
from icarus.errors import AdapterError, UnsupportedModelError

hf: Any = transformers  # its model classes are untyped
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
O_PROJ = "base_model.model.model.layers.0.self_attn.o_proj"
IDS = torch.arange(8)[None]


def llama(seed: int = 0, **sizes: Any) -> Any:
    torch.manual_seed(seed)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES | sizes)).eval()


def phi3() -> Any:
    return hf.Phi3ForCausalLM(hf.Phi3Config(**SIZES, pad_token_id=0))


def qwen2() -> Any:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES))


def qwen3_moe() -> Any:
    moe = {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SIZES, **moe, mlp_only_layers=[0]))


def deepseek() -> Any:
    mla = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    moe = {"moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    sizes = SIZES | {"num_key_value_heads": 4}
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**sizes, **mla, **moe, first_k_dense_replace=1))


def gpt2() -> Any:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32))


def specialist(model: nn.Module, name: str = "default", seed: int = 1, **options: Any) -> Any:
    """An adapter whose weights do something."""
    peft_model = adapter.attach(model, name=name, **{"rank": 4} | options)
    torch.manual_seed(seed)
    for path, weight in peft_model.named_parameters():
        if f".{name}." in path:
            weight.data.normal_()
    return peft_model


def weights(model: PeftModel, name: str) -> dict[str, Tensor]:
    return {
        path.replace(f".{name}.", "."): weight.detach().clone()
        for path, weight in model.named_parameters()
        if f".{name}." in path
    }


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A sound adapter of rank 4 on ``llama()``."""
    return adapter.save(specialist(llama()), tmp_path / "good")


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (llama, ["down_proj", "gate_proj", "o_proj", "q_proj", "up_proj"]),
        (qwen2, ["down_proj", "gate_proj", "o_proj", "q_proj", "up_proj"]),
        (phi3, ["down_proj", "gate_up_proj", "o_proj"]),
        (qwen3_moe, ["o_proj", "q_proj"]),
        (deepseek, ["o_proj", "q_a_proj", "q_b_proj"]),
        (gpt2, ["c_fc", "c_proj"]),
    ],
)
def test_default_targets(build: Callable[[], Any], expected: list[str], tmp_path: Path) -> None:
    model = build()
    assert adapter.decoder_targets(model) == expected
    peft_model = specialist(model)
    assert adapter.decoder_targets(peft_model) == adapter.decoder_targets(model) == expected
    directory = adapter.save(peft_model, tmp_path / "adapter")
    assert adapter.verify(directory, peft_model).targets == tuple(expected)


WRITE_KV = """k_proj v_proj qkv_proj Wqkv W_pack c_attn query_key_value in_proj in_proj_qkvz kv_a_proj_with_mqa kv_b_proj
key value kv_proj to_k to_kv wk Wv linear_k attn.qkv x_proj dt_proj model.layers.3.self_attn.k_proj"""
READ_KV = """q_proj o_proj gate_up_proj down_proj q_a_proj q_b_proj wq_b dense dense_h_to_4h fc1 w1 w2 c_proj c_fc out_proj
g_proj kv.o_proj lm_head"""


@pytest.mark.parametrize("name", WRITE_KV.split())
def test_feeds_kv(name: str) -> None:
    assert adapter.feeds_kv(name)


@pytest.mark.parametrize("name", READ_KV.split())
def test_does_not_feed_kv(name: str) -> None:
    assert not adapter.feeds_kv(name)


def test_model_of_nothing_but_kv_is_refused() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"qkv_proj": nn.Linear(2, 6)})])
    with pytest.raises(UnsupportedModelError, match="no linear projection"):
        adapter.decoder_targets(model)


# ---------------------------------------------------------------------------------------------- attach


def test_attach_is_fresh_trainable_and_active() -> None:
    model = llama()
    before = model(IDS).logits
    peft_model: Any = adapter.attach(model, rank=8)
    config = peft_model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.task_type) == (8, 16, "CAUSAL_LM")
    assert torch.equal(peft_model(IDS).logits, before)
    assert {".lora_" in name for name, weight in peft_model.named_parameters() if weight.requires_grad} == {True}
    again = adapter.attach(peft_model, name="second")
    assert again is peft_model
    assert adapter.names(peft_model) == ["default", "second"]
    assert peft_model.active_adapters == ["second"]
    assert adapter.names(llama()) == []


def test_attach_keeps_the_callers_config() -> None:
    config = LoraConfig(r=2, lora_alpha=3)
    peft_model: Any = adapter.attach(llama(), config)
    assert set(peft_model.peft_config["default"].target_modules) == set(adapter.decoder_targets(llama()))
    assert peft_model.peft_config["default"].r == 2
    assert config.target_modules is None


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"target_modules": ["q_proj", "k_proj"]}, "k_proj"),
        ({"target_modules": "all-linear"}, "k_proj, v_proj"),
        ({"target_modules": r".*self_attn\.(q|v)_proj"}, "v_proj"),
        ({"target_modules": ["model.layers.1.self_attn.v_proj"]}, "v_proj"),
        ({"target_modules": ["q_proj"], "rank_pattern": {r".*\.k_proj$": 2}}, "k_proj"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"v_proj": 2}}, "v_proj"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"use_dora": True}, "use_dora"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"target_parameters": ["mlp.up_proj.weight"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [(0, 2)]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ["nothing"]}, "nothing"),
    ],
)
@pytest.mark.parametrize("second", [False, True])
def test_attach_refuses_and_leaves_the_model(config: dict[str, Any], named: str, second: bool) -> None:
    model: nn.Module = llama()
    if second:
        model = specialist(model, "first")
    state = picture(model)
    with pytest.raises((AdapterError, UnsupportedModelError), match=named):
        adapter.attach(model, LoraConfig(**config), name="bad")
    assert picture(model) == state


def test_fused_qkv_is_refused_by_what_the_targets_resolve_to() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"qkv_proj.*target_modules=\['down_proj', 'gate_up_proj', 'o_proj'\]"
    ):
        adapter.attach(phi3(), LoraConfig(target_modules="all-linear"))


def test_experts_are_refused() -> None:
    with pytest.raises(AdapterError, match="target_parameters"):
        adapter.attach(qwen3_moe(), LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"]))


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "train", "items", "layers", "0", "weight", "lora_A"])
def test_names_that_break_peft_are_refused(name: str) -> None:
    with pytest.raises(AdapterError, match="cannot name an adapter"):
        adapter.attach(llama(), name=name)


def test_second_adapter_of_one_name_is_refused() -> None:
    with pytest.raises(AdapterError, match="already has an adapter 'default'"):
        adapter.attach(adapter.attach(llama()))


def picture(model: nn.Module) -> tuple[Any, ...]:
    """All that a failed call could have changed."""
    modules = [(name, id(module), module.training, sorted(vars(module))) for name, module in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad, p.detach().sum().item()) for name, p in model.named_parameters()]
    active = model.active_adapters if isinstance(model, PeftModel) else None
    return modules, parameters, adapter.names(model), active, model(IDS).logits.sum().item()


# ---------------------------------------------------------------------------------------------- round trip


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    peft_model = specialist(llama(), "sql")
    directory = adapter.save(peft_model, tmp_path / "deep" / "adapter", name="sql")
    assert sorted(os.listdir(directory)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert os.listdir(directory.parent) == ["adapter"]
    assert {file.stat().st_mode & 0o777 for file in directory.iterdir()} == {0o666 & ~umask()}
    loaded = adapter.load(llama(), directory, "other")
    assert equal(weights(loaded, "other"), weights(peft_model, "sql"))
    assert torch.equal(loaded(IDS).logits, peft_model.eval()(IDS).logits)
    assert not any(weight.requires_grad for weight in loaded.parameters())
    again = adapter.save(loaded, tmp_path / "again", name="other")
    for file in directory.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_config_is_pefts_with_the_marker(good: Path) -> None:
    config = json.loads((good / "adapter_config.json").read_text())
    assert config.pop("icarus") == {"version": adapter.MARKER_VERSION, "base_fingerprint": adapter.fingerprint(llama())}
    assert config["target_modules"] == adapter.decoder_targets(llama())
    assert config.keys() <= vars(LoraConfig()).keys()


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_plain_peft_reads_the_directory(good: Path) -> None:
    plain = PeftModel.from_pretrained(llama(), str(good))
    assert equal(weights(plain, "default"), weights(adapter.load(llama(), good, "default"), "default"))


def test_adapter_that_peft_made_can_be_saved(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM", rank_pattern={"layers.1.*o_proj": 3})
    directory = adapter.save(get_peft_model(llama(), config), tmp_path / "adapter")
    assert adapter.verify(directory, llama()).rank == 3


def test_info(good: Path) -> None:
    info = adapter.verify(good, llama())
    file = load_file(good / "adapter_model.safetensors")
    assert info == adapter.AdapterInfo(
        directory=good,
        base_model=None,
        rank=4,
        alpha=8.0,
        targets=("down_proj", "gate_proj", "o_proj", "q_proj", "up_proj"),
        base_fingerprint=adapter.fingerprint(llama()),
        tensors=20,
        bytes=sum(4 * tensor.numel() for tensor in file.values()),
    )


def test_dtype_and_given_fingerprint_are_stored(tmp_path: Path) -> None:
    directory = adapter.save(specialist(llama()), tmp_path / "a", dtype=torch.bfloat16, base_fingerprint="abc1")
    assert {t.dtype for t in load_file(directory / "adapter_model.safetensors").values()} == {torch.bfloat16}
    assert adapter.verify(directory).base_fingerprint == "abc1"


def test_card(tmp_path: Path) -> None:
    peft_model = specialist(llama())
    peft_model.peft_config["default"].base_model_name_or_path = "acme/tiny"
    text = (
        adapter.save(peft_model, tmp_path / "a", card={"license": "mit", "tags": ["sql"]}) / "README.md"
    ).read_text()
    card: Any = huggingface_hub.ModelCard(text)
    assert (card.data.library_name, card.data.base_model, card.data.license) == ("peft", "acme/tiny", "mit")
    assert card.data.tags == ["icarus", "lora", "shared-kv-cache", "sql"]
    for wanted in ("Do not load it as a plain LoRA", "subtly wrong", "adapter.load(", "icarus verify", "icarus serve"):
        assert wanted in text
    peft_model.peft_config["default"].base_model_name_or_path = "/data/tiny"
    text = (adapter.save(peft_model, tmp_path / "b") / "README.md").read_text()
    card = huggingface_hub.ModelCard(text)
    assert card.data.base_model is None, "the Hub refuses a card with a local path"
    assert "/data/tiny" in text


def test_is_icarus(good: Path, tmp_path: Path) -> None:
    assert adapter.is_icarus(good)
    assert not adapter.is_icarus(tmp_path)
    edit(lambda config: config.pop("icarus"))(good)
    assert not adapter.is_icarus(good)
    (good / "adapter_config.json").write_text("[")
    assert not adapter.is_icarus(good)


# ---------------------------------------------------------------------------------------------- verify

Damage = Callable[[Path], object]


def edit(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(directory: Path) -> None:
        file = directory / "adapter_config.json"
        config = json.loads(file.read_text())
        change(config)
        file.write_text(json.dumps(config))

    return damage


def setting(**fields: Any) -> Damage:
    return edit(lambda config: config.update(fields))


def marker(**fields: Any) -> Damage:
    return edit(lambda config: config["icarus"].update(fields))


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def damage(directory: Path) -> None:
        file = directory / "adapter_model.safetensors"
        found = load_file(file)
        change(found)
        save_file(found, file)

    return damage


def both(*damages: Damage) -> Damage:
    return lambda directory: [damage(directory) for damage in damages]


def kv_tensors(found: dict[str, Tensor]) -> None:
    found[O_PROJ.replace("o_proj", "k_proj") + ".lora_A.weight"] = torch.zeros(4, 32)
    found[O_PROJ.replace("o_proj", "k_proj") + ".lora_B.weight"] = torch.zeros(16, 4)


def rank_of_o_proj(found: dict[str, Tensor]) -> None:
    found[f"{O_PROJ}.lora_A.weight"] = torch.zeros(3, 32)
    found[f"{O_PROJ}.lora_B.weight"] = torch.zeros(32, 3)


def poison(value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(found: dict[str, Tensor]) -> None:
        found[f"{O_PROJ}.lora_A.weight"][1, 2] = value

    return change


def cut(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def pickle_only(directory: Path) -> None:
    torch.save({}, directory / "adapter_model.bin")
    (directory / "adapter_model.safetensors").unlink()


DAMAGES: dict[str, tuple[Damage, str]] = {
    "directory": (lambda d: d.rename(d.parent / "moved"), "no such directory"),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "broken json": (lambda d: (d / "adapter_config.json").write_text("{"), "adapter_config.json is not readable JSON"),
    "binary config": (lambda d: (d / "adapter_config.json").write_bytes(b"\xff\xfe"), "not readable JSON"),
    "config is a list": (lambda d: (d / "adapter_config.json").write_text("[]"), "not a JSON object"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "pickle": (pickle_only, "adapter_model.bin is there, a pickle"),
    "truncated": (cut, "adapter_model.safetensors is truncated"),
    "not safetensors": (lambda d: (d / "adapter_model.safetensors").write_bytes(b"hello"), "no safetensors file"),
    "no marker": (edit(lambda c: c.pop("icarus")), "plain LoRA: serve it as a conventional adapter, or retrain"),
    "marker version": (marker(version=2), "marker version 2 is unknown"),
    "marker without version": (edit(lambda c: c["icarus"].pop("version")), "malformed"),
    "marker version true": (marker(version=True), "malformed"),
    "marker is a word": (setting(icarus="yes"), "malformed"),
    "marker without fingerprint": (edit(lambda c: c["icarus"].pop("base_fingerprint")), "base_fingerprint"),
    "marker with odd fingerprint": (marker(base_fingerprint="xyz"), "base_fingerprint"),
    "peft type": (setting(peft_type="IA3"), "peft_type is 'IA3'"),
    "task type": (setting(task_type="SEQ_CLS"), "task_type is 'SEQ_CLS'"),
    "no task type": (setting(task_type=None), "task_type is None"),
    "bias": (setting(bias="all"), "bias is 'all'"),
    "modules_to_save": (setting(modules_to_save=["norm"]), "modules_to_save is set"),
    "dora": (setting(use_dora=True), "use_dora is set"),
    "alora": (setting(alora_invocation_tokens=[1]), "alora_invocation_tokens is set"),
    "target_parameters": (setting(target_parameters=["experts.up_proj"]), "target_parameters is set"),
    "trainable tokens": (setting(trainable_token_indices=[1]), "trainable_token_indices is set"),
    "layer_replication": (setting(layer_replication=[[0, 2]]), "layer_replication is set"),
    "pissa": (setting(init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
    "k target": (edit(lambda c: c["target_modules"].append("k_proj")), "target_modules has k_proj"),
    "path of v target": (edit(lambda c: c["target_modules"].append("self_attn.v_proj")), "has self_attn.v_proj"),
    "regex target": (setting(target_modules=r".*proj"), "target_modules has .*proj"),
    "all-linear": (setting(target_modules="all-linear"), "target_modules has all-linear"),
    "rank_pattern of k": (setting(rank_pattern={"layers.1.self_attn.k_proj": 4}), "rank_pattern names"),
    "bad regex": (setting(target_modules="("), "no regular expression"),
    "no targets": (setting(target_modules=None), "target_modules names no modules"),
    "rank zero": (setting(r=0), "r is 0"),
    "rank text": (setting(r="4"), "r is '4'"),
    "alpha": (setting(lora_alpha=None), "lora_alpha is None"),
    "rank_pattern": (setting(rank_pattern={"o_proj": "x"}), "rank_pattern does not map"),
    "kv tensors": (tensors(kv_tensors), "weights for model.layers.0.self_attn.k_proj, which feeds K or V"),
    "missing half": (tensors(lambda t: t.pop(f"{O_PROJ}.lora_B.weight")), "lora_B of model.layers.0.self_attn.o_proj"),
    "foreign tensor": (tensors(lambda t: t.update({"lm_head.weight": torch.ones(2)})), "lm_head.weight is no LoRA"),
    "untargeted": (edit(lambda c: c["target_modules"].remove("o_proj")), "o_proj, which target_modules does not name"),
    "excluded": (setting(exclude_modules=["o_proj"]), "o_proj, which target_modules does not name"),
    "other layers": (setting(layers_to_transform=[1]), "layers.0.*target_modules does not name"),
    "no tensors": (tensors(lambda t: t.clear()), "holds no tensors"),
    "halves of two ranks": (
        tensors(lambda t: t.update({f"{O_PROJ}.lora_A.weight": torch.zeros(3, 32)})),
        "do not fit together",
    ),
    "vector": (tensors(lambda t: t.update({f"{O_PROJ}.lora_A.weight": torch.zeros(32)})), "do not fit together"),
    "rank": (setting(r=8), "has rank 4 and the config says 8"),
    "rank of one": (tensors(rank_of_o_proj), "o_proj has rank 3 and the config says 4"),
    "rank by pattern": (setting(rank_pattern={"o_proj": 2}), "o_proj has rank 4 and the config says 2"),
    "nan": (tensors(poison(float("nan"))), r"o_proj.lora_A.weight holds NaN"),
    "inf": (tensors(poison(float("-inf"))), r"o_proj.lora_A.weight holds NaN or inf"),
    "integers": (
        tensors(lambda t: t.update({f"{O_PROJ}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int8)})),
        "torch.int8 and not floating",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: str, good: Path) -> None:
    assert adapter.problems(good) == []
    spoil, message = DAMAGES[damage]
    spoil(good)
    assert adapter.problems(good)
    with pytest.raises(AdapterError, match=message) as error:
        adapter.verify(good)
    assert str(good) in str(error.value)
    assert ": " in adapter.problems(good)[0], "reason: remedy"
    model = llama()
    state = picture(model)
    with pytest.raises(AdapterError, match=message):
        adapter.load(model, good, "bad")
    assert picture(model) == state


def test_all_problems_are_listed(good: Path) -> None:
    both(setting(use_dora=True), marker(version=7), tensors(poison(float("nan"))), tensors(kv_tensors))(good)
    found = adapter.problems(good)
    assert len(found) == 4
    for word in ("version 7", "use_dora", "NaN", "k_proj"):
        assert len([problem for problem in found if word in problem]) == 1
    with pytest.raises(AdapterError, match=r"version 7.*3 more problems"):
        adapter.verify(good)


def resize(found: dict[str, Tensor]) -> None:
    found[f"{O_PROJ}.lora_A.weight"] = torch.zeros(4, 16)


def drop_module(found: dict[str, Tensor]) -> None:
    del found[f"{O_PROJ}.lora_A.weight"], found[f"{O_PROJ}.lora_B.weight"]


def add_layer(found: dict[str, Tensor]) -> None:
    for half in "AB":
        found[O_PROJ.replace("0", "7") + f".lora_{half}.weight"] = found[f"{O_PROJ}.lora_{half}.weight"].clone()


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (tensors(resize), r"o_proj is \(32, 16\) here and \(32, 32\) in the base"),
        (tensors(drop_module), "weights of model.layers.0.self_attn.o_proj, which target_modules names, are missing"),
        (tensors(add_layer), "model.layers.7.self_attn.o_proj, which the base model lacks"),
        (marker(base_fingerprint="0" * 64), "trained on another base model .*fingerprint 000000000000"),
    ],
)
def test_mismatch_with_the_base_is_named(
    damage: Damage, message: str, loaded: bool, good: Path, base_folder: Path
) -> None:
    base = llama() if loaded else base_folder
    assert adapter.problems(good, base) == []
    damage(good)
    assert adapter.problems(good) == [], "only the base tells"
    with pytest.raises(AdapterError, match=message):
        adapter.verify(good, base)


def test_wrong_base_is_refused_by_load(good: Path) -> None:
    model = llama(seed=5)
    state = picture(model)
    with pytest.raises(AdapterError, match="another base model"):
        adapter.load(model, good, "sql")
    assert picture(model) == state
    assert adapter.names(adapter.load(model, good, "sql", verify=False)) == ["sql"]


def test_base_whose_checkpoint_has_other_names(tmp_path: Path) -> None:
    model = gpt2()
    model.transformer.save_pretrained(
        tmp_path / "base"
    )  # as on the Hub: h.0..., where the model has transformer.h.0...
    directory = adapter.save(specialist(model), tmp_path / "adapter")
    assert adapter.problems(directory, tmp_path / "base") == []
    tensors(lambda t: t.pop(next(iter(t))))(directory)
    assert adapter.problems(directory, tmp_path / "base") != []


@pytest.mark.parametrize("build", [phi3, qwen3_moe, deepseek, gpt2])
def test_other_models_verify_against_their_folder(build: Callable[[], Any], tmp_path: Path) -> None:
    model = build().eval()
    model.save_pretrained(tmp_path / "base")
    peft_model = specialist(model)
    directory = adapter.save(peft_model, tmp_path / "adapter")
    assert adapter.problems(directory, tmp_path / "base") == []
    loaded = adapter.load(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), directory, "again")
    assert torch.equal(loaded(IDS).logits, peft_model.eval()(IDS).logits)


def test_verify_needs_neither_peft_nor_transformers(good: Path, base_folder: Path) -> None:
    code = (
        "import sys; from icarus import adapter; adapter.verify(sys.argv[1], sys.argv[2]);"
        "print([name for name in ('peft', 'transformers') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(good), str(base_folder)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


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
    found = check_target_module_exists(LoraConfig(**fields), module)
    assert adapter._targeted(fields, module) == (bool(found) and not isinstance(found, _ExcludedModule))


@given(
    ranks=st.dictionaries(st.sampled_from(["o_proj", "layers.0.*", "up", r"mlp\.up_proj", MODULES[0]]), st.just(2)),
    module=st.sampled_from(MODULES),
)
def test_ranks_match_as_in_peft(ranks: dict[str, int], module: str) -> None:
    expected = ranks.get(get_pattern_key(list(ranks), module), 9)
    assert adapter._rank({"r": 9, "rank_pattern": ranks}, module) == expected


# ---------------------------------------------------------------------------------------------- save, atomically


def test_save_refuses_and_leaves_the_old_adapter(tmp_path: Path) -> None:
    peft_model = specialist(llama())
    directory = adapter.save(peft_model, tmp_path / "adapter")
    before = contents(tmp_path)
    broken = next(weight for name, weight in peft_model.named_parameters() if "o_proj.lora_A" in name)
    broken.data[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="NaN"):
        adapter.save(peft_model, directory)
    kv = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(AdapterError, match="v_proj"):
        adapter.save(kv, directory)
    with pytest.raises(AdapterError, match="no adapter 'other'"):
        adapter.save(peft_model, directory, name="other")
    assert contents(tmp_path) == before


def test_overflow_of_the_stored_type_is_refused(tmp_path: Path) -> None:
    peft_model = specialist(llama())
    next(weight for name, weight in peft_model.named_parameters() if "lora_A" in name).data[0, 0] = 1e6
    with pytest.raises(AdapterError, match="infinity"):
        adapter.save(peft_model, tmp_path / "adapter", dtype=torch.float16)
    assert contents(tmp_path) == {}


def test_save_onto_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AdapterError, match="is a file"):
        adapter.save(specialist(llama()), tmp_path / "file")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def no_exchange(one: Path, other: Path) -> bool:
    return False


class CrashError(RuntimeError):
    """Not an error that anyone would catch on the way."""


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("existing", ["nothing", "an adapter", "other files"])
@pytest.mark.parametrize("call", ["fsync", "replace", "link"])
def test_crash_leaves_the_old_adapter(
    call: str, existing: str, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every single call that touches the disk fails once."""
    directory = tmp_path / "adapter"
    old, new = specialist(llama(), seed=1), specialist(llama(), seed=2)
    if existing == "an adapter":
        adapter.save(old, directory)
    if existing != "nothing":
        directory.mkdir(exist_ok=True)
        (directory / "notes.txt").write_text("mine")
    before = contents(directory)
    if not exchange:
        monkeypatch.setattr(adapter, "_exchange", no_exchange)
    real = getattr(os, call)
    for countdown in range(1, 20):
        remaining = countdown

        def failing(*arguments: Any, **options: Any) -> Any:
            nonlocal remaining
            remaining -= 1
            if remaining == 0:
                raise CrashError
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            with suppress(CrashError):
                adapter.save(new, directory)
        if remaining > 0:
            break  # fewer calls than that: the save went through
        now = contents(directory)
        if existing == "an adapter":
            assert now == before or whole(directory, new)
        else:
            assert whole(directory, new) or not adapter.is_icarus(directory)
        assert [path.name for path in tmp_path.iterdir()] in (["adapter"], [])
    assert whole(directory, new)
    assert existing == "nothing" or (directory / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def whole(directory: Path, model: PeftModel) -> bool:
    if not adapter.is_icarus(directory):
        return False
    loaded = adapter.load(llama(), directory, "default")
    return equal(weights(loaded, "default"), weights(model, "default"))


def test_power_cut_at_the_exchange_leaves_the_old_adapter(tmp_path: Path) -> None:
    directory = adapter.save(specialist(llama(), seed=1), tmp_path / "adapter")
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_adapter import adapter, llama, specialist
exchange = adapter._exchange
def cut(one, other):
    sys.argv[2] == "after" and exchange(one, other)
    os._exit(9)
adapter._exchange = cut
adapter.save(specialist(llama(), seed=2), sys.argv[1])
"""
    for moment, seed in (("before", 1), ("after", 2)):
        run = subprocess.run([sys.executable, "-c", code, str(directory), moment], check=False)
        assert run.returncode == 9
        assert whole(directory, specialist(llama(), seed=seed))


def test_replacing_keeps_other_files_and_drops_the_old_pickle(good: Path) -> None:
    (good / "tokenizer.json").write_text("mine")
    (good / "checkpoint-1").mkdir()
    (good / "checkpoint-1" / "adapter_config.json").write_text("older")
    (good / "adapter_model.bin").write_text("pickle")
    adapter.save(specialist(llama(), seed=3), good)
    assert (good / "tokenizer.json").read_text() == "mine"
    assert (good / "checkpoint-1" / "adapter_config.json").read_text() == "older"
    assert not (good / "adapter_model.bin").exists()
    assert whole(good, specialist(llama(), seed=3))


def test_file_system_without_links_copies(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*arguments: object) -> None:
        raise OSError("no hard links here")

    (good / "notes.txt").write_text("mine")
    monkeypatch.setattr(os, "link", no_link)
    adapter.save(specialist(llama(), seed=3), good)
    assert (good / "notes.txt").read_text() == "mine"


# ---------------------------------------------------------------------------------------------- load


def test_several_adapters_on_one_base(tmp_path: Path) -> None:
    one = adapter.save(specialist(llama(), seed=1), tmp_path / "one")
    two = adapter.save(specialist(llama(), seed=2, rank=2, targets=["o_proj"]), tmp_path / "two")
    model = adapter.load(adapter.load(llama(), one, "a"), two, "b")
    assert adapter.names(model) == ["a", "b"]
    assert model.active_adapters == ["a"]
    assert not any(weight.requires_grad for weight in model.parameters())
    assert equal(weights(model, "b"), weights(specialist(llama(), seed=2, rank=2, targets=["o_proj"]), "default"))
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, llama()(IDS).logits)


@pytest.mark.parametrize("alone", [True, False])
def test_load_replaces_an_adapter_of_that_name(alone: bool, tmp_path: Path) -> None:
    one = adapter.save(specialist(llama(), seed=1), tmp_path / "one")
    two = adapter.save(specialist(llama(), seed=2, rank=2, targets=["o_proj", "q_proj"]), tmp_path / "two")
    model = adapter.load(llama(), one, "a")
    if not alone:
        adapter.load(model, one, "b")
    adapter.load(model, two, "a")
    assert sorted(adapter.names(model)) == (["a"] if alone else ["a", "b"])
    assert model.active_adapters == ["a"]
    assert torch.equal(model(IDS).logits, adapter.load(llama(), two, "x")(IDS).logits)
    assert not any(weight.requires_grad for weight in model.parameters())
    if not alone:
        model.set_adapter("b")
        assert torch.equal(model(IDS).logits, adapter.load(llama(), one, "x")(IDS).logits)


def test_trainable_load(good: Path) -> None:
    model = adapter.load(llama(), good, "a", is_trainable=True)
    assert {n for n, w in model.named_parameters() if w.requires_grad} == {
        n for n, _ in model.named_parameters() if ".a." in n
    }
    model(IDS).logits.sum().backward()


@pytest.mark.parametrize("existing", [None, "other", "same"])
def test_failure_inside_peft_leaves_the_model(
    existing: str | None, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: nn.Module = llama()
    if existing:
        model = specialist(model, existing)
    model.train()
    state = picture(model)

    def half_done(self: PeftModel, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        raise RuntimeError("out of memory")

    real = PeftModel.load_adapter
    monkeypatch.setattr(PeftModel, "load_adapter", half_done)
    with pytest.raises(AdapterError, match="out of memory"):
        adapter.load(model, good, "same")
    assert picture(model) == state
    monkeypatch.undo()
    assert "same" in adapter.names(adapter.load(model, good, "same"))


def test_tensor_that_peft_does_not_load_is_noticed(good: Path) -> None:
    tensors(add_layer)(good)
    with pytest.raises(AdapterError, match=r"did not load .*layers\.7"):
        adapter.load(llama(), good, "a", verify=False)


def test_load_is_quiet(good: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = adapter.load(llama(), good, "a")
    adapter.load(model, good, "a")
    assert [str(warning.message) for warning in recwarn if "icarus" in str(warning.message)] == []
    assert [str(warning.message) for warning in recwarn if "now deleted" in str(warning.message)] == []


# ---------------------------------------------------------------------------------------------- the Hub


class FakeHub:
    """Stands for HfApi: what was asked, and what was in the folder at that time."""

    def __init__(self, token: str | None = None) -> None:
        CALLS.append(("token", token))

    def create_repo(self, repo_id: str, **options: Any) -> None:
        CALLS.append(("create", repo_id, options))

    def upload_folder(self, *, folder_path: Path, **options: Any) -> str:
        CALLS.append(("upload", options, contents(Path(folder_path))))
        return "commit"


CALLS: list[tuple[Any, ...]] = []


def test_push_to_hub(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    result: object = adapter.push_to_hub(specialist(llama()), "me/sql", private=True, token="secret", revision="v1")
    assert result == "commit"
    token, create, (_, options, files) = CALLS
    assert (token, create) == (("token", "secret"), ("create", "me/sql", {"private": True, "exist_ok": True}))
    assert (options["repo_id"], options["revision"], options["create_pr"]) == ("me/sql", "v1", False)
    assert files == contents(good)


def test_from_pretrained_reads_the_hub_and_prefers_a_local_path(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options["revision"]))
        return str(good)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    model = adapter.from_pretrained(llama(), "me/sql", revision="v1")
    assert adapter.names(model) == ["default"]
    assert asked == [("me/sql", "v1")]
    adapter.save(model, "me/sql")
    adapter.from_pretrained(llama(), "me/sql")
    assert len(asked) == 1


def test_offline_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: Any, **options: Any) -> str:
        raise LocalEntryNotFoundError("Cannot find the snapshot.\nmore\nlines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        AdapterError, match=r"^me/sql is no local folder and .*Cannot find the snapshot\): check"
    ) as error:
        adapter.load(llama(), "me/sql", "a")
    assert "\n" not in str(error.value)
    with pytest.raises(AdapterError, match="no such directory"):
        adapter.load(llama(), "no-such-folder", "a")
