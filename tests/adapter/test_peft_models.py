"""Adapters in memory and on disk: what is written is what is read, and nothing unsafe gets through either way."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from icarus import adapter
from icarus.adapter import checks
from icarus.errors import AdapterError, UnsupportedModelError
from icarus.streams import EncoderCache, TwoStreams
from specimens import (
    DAMAGES,
    IDS,
    add_layer,
    contents,
    deepseek,
    equal,
    gpt2,
    llama,
    phi3,
    picture,
    qwen2,
    qwen2_moe,
    qwen3_moe,
    setting,
    specialist,
    tensors,
    weights,
)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A sound adapter of rank 4 on ``llama()``."""
    return adapter.save(specialist(llama()), tmp_path / "good")


# ---------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (llama, ["down_proj", "gate_proj", "o_proj", "q_proj", "up_proj"]),
        (qwen2, ["down_proj", "gate_proj", "o_proj", "q_proj", "up_proj"]),
        (phi3, ["down_proj", "gate_up_proj", "o_proj"]),
        (qwen3_moe, ["o_proj", "q_proj"]),
        (qwen2_moe, ["down_proj", "gate_proj", "o_proj", "q_proj", "up_proj"]),  # of the shared expert
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
        ({"target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 0}}, "lora_alpha is 0"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"use_dora": True}, "use_dora"),
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens"),
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


def test_failure_keeps_containers_that_others_hold() -> None:
    model = llama()
    handle = model.model.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError):
        adapter.attach(model, LoraConfig(target_modules=["v_proj"]))
    handle.remove()
    assert not model.model._forward_hooks


@pytest.mark.parametrize("options", [{"rank": 0}, {"dropout": 7.0}, {"targets": "("}])
def test_nonsense_is_refused_and_leaves_the_model(options: dict[str, Any]) -> None:
    model = llama()
    state = picture(model)
    with pytest.raises(AdapterError, match=r"cannot (be )?attach"):
        adapter.attach(model, **options)
    assert picture(model) == state


def test_fused_qkv_is_refused_by_what_the_targets_resolve_to() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"qkv_proj.*target_modules=\['down_proj', 'gate_up_proj', 'o_proj'\]"
    ):
        adapter.attach(phi3(), LoraConfig(target_modules="all-linear"))


@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning:peft")  # PEFT's own words on it
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


def test_merged_adapters_and_variants_are_refused() -> None:
    model = specialist(llama(), "first")
    adapter.check_attached(model, "first")
    model.merge_adapter()
    with pytest.raises(AdapterError, match="merged into model"):
        adapter.check_attached(model, "first")
    config = LoraConfig(target_modules=["o_proj"], task_type="CAUSAL_LM", use_dora=True)
    dora = get_peft_model(llama(), config)
    config.use_dora = False  # the layers tell nevertheless
    with pytest.raises(AdapterError, match=r"not plain LoRA on model\.layers\.0\.self_attn\.o_proj"):
        adapter.check_attached(dora, "default")


@pytest.mark.parametrize("training", [False, True])
def test_new_modules_follow_the_models_mode(training: bool, tmp_path: Path) -> None:
    model = llama().train(training)
    frozen = model.model.layers[0].eval()
    peft_model = specialist(model, "a", dropout=0.5)
    adapter.attach(peft_model, name="b", dropout=0.5)
    assert {module.training for module in peft_model.modules() if isinstance(module, nn.Dropout)} == {training}
    source = adapter.save(peft_model, tmp_path / "a", name="a")
    adapter.load(peft_model, source, "c", is_trainable=True)
    adapter.load(peft_model, source, "a")
    fresh = adapter.load(llama().train(training), source)
    for adapted, count in ((peft_model, 30), (fresh, 10)):
        drops = [module for module in adapted.modules() if isinstance(module, nn.Dropout)]
        assert len(drops) == count
        assert {module.training for module in (adapted, *drops)} == {training}
    assert not frozen.training
    peft_model.set_adapter("a")
    assert torch.equal(peft_model(IDS).logits, peft_model(IDS).logits) is not training


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


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning:peft")
def test_plain_peft_reads_the_directory(good: Path) -> None:
    plain = PeftModel.from_pretrained(llama(), str(good))
    assert equal(weights(plain, "default"), weights(adapter.load(llama(), good, "default"), "default"))


def test_adapter_that_peft_made_can_be_saved(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM", use_rslora=True)
    directory = adapter.save(get_peft_model(llama(), config), tmp_path / "adapter")
    assert adapter.verify(directory, llama()).rank == 2


def test_patterns_of_ranks_and_alphas(tmp_path: Path) -> None:
    """A key names the end of a path or matches it, and the first one counts, as in PEFT."""
    ranks = {"layers.0.self_attn.o_proj": 6, "o_proj": 2, r"layers\.1\..*": 3}
    config = LoraConfig(r=4, lora_alpha=8, rank_pattern=ranks, alpha_pattern={"o_proj": 5})
    peft_model = adapter.attach(llama(), config)
    torch.manual_seed(1)
    for name, weight in peft_model.named_parameters():
        if ".lora_" in name:
            weight.data.normal_()
    directory = adapter.save(peft_model, tmp_path / "adapter")
    stored = load_file(directory / "adapter_model.safetensors")
    ranks = {name: len(t) for name, t in stored.items() if "lora_A" in name and ("o_proj" in name or "q_proj" in name)}
    assert sorted(ranks.values()) == [2, 3, 4, 6]
    info = adapter.verify(directory, llama())
    assert (info.rank, info.patterns) == (6, ("rank_pattern", "alpha_pattern"))
    loaded = adapter.load(llama(), directory)
    assert torch.equal(loaded(IDS).logits, peft_model.eval()(IDS).logits)
    setting(rank_pattern={"o_proj": 2})(directory)
    assert "has rank 6 and the config says 2" in adapter.problems(directory)[0]


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
    for wanted in ("Do not load it as a plain LoRA", "subtly wrong", "Specialists.load(", "icarus verify"):
        assert wanted in text
    peft_model.peft_config["default"].base_model_name_or_path = "/data/tiny"
    text = (adapter.save(peft_model, tmp_path / "b") / "README.md").read_text()
    card = huggingface_hub.ModelCard(text)
    assert card.data.base_model is None, "the Hub refuses a card with a local path"
    assert "/data/tiny" in text


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


@pytest.mark.parametrize("active", "ab")
@pytest.mark.parametrize("reloaded", "ab")
@pytest.mark.parametrize("asked", "ab")
def test_streams_use_the_asked_adapter_after_a_reload(active: str, reloaded: str, asked: str, tmp_path: Path) -> None:
    saved = {name: adapter.save(specialist(llama(), seed=ord(name)), tmp_path / name) for name in "ab"}

    def decoded(model: PeftModel) -> torch.Tensor:
        streams, cache = TwoStreams(model), EncoderCache()
        streams.encode(IDS, cache)
        return streams.decode(IDS, cache, asked)

    model = adapter.load(adapter.load(llama(), saved["a"], "a"), saved["b"], "b")
    model.set_adapter(active)
    adapter.load(model, saved[reloaded], reloaded)
    assert [model.active_adapter] == model.active_adapters == [active]
    assert torch.equal(decoded(model), decoded(adapter.load(llama(), saved[asked], asked)))


def test_known_fingerprint_saves_hashing_the_model(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = adapter.fingerprint(llama())

    def hashing(*arguments: object) -> str:
        raise AssertionError("the model is hashed")

    monkeypatch.setattr(checks, "fingerprint", hashing)
    assert adapter.names(adapter.load(llama(), good, "a", base_fingerprint=mark)) == ["a"]
    with pytest.raises(AdapterError, match="another base model"):
        adapter.load(llama(), good, "a", base_fingerprint="0" * 64)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_conventional_round_trip(dtype: torch.dtype | None, tmp_path: Path) -> None:
    model = adapter.attach_conventional(llama(), rank=4)
    adapted = {path.split(".")[-2] for path, module in model.named_modules() if path.endswith(".lora_A")}
    assert {"k_proj", "v_proj", "o_proj", "up_proj"} <= adapted
    directory = adapter.save_conventional(model, tmp_path / "adapter", dtype=dtype)
    assert {file.stat().st_mode & 0o777 for file in directory.iterdir()} == {0o666 & ~umask()}
    with pytest.raises(AdapterError, match="plain LoRA"):
        adapter.load(llama(), directory, "a")
    loaded = weights(adapter.load(llama(), directory, "a", verify=False), "a")
    expected = {name: weight.to(dtype or weight.dtype).float() for name, weight in weights(model, "default").items()}
    assert equal(loaded, expected)


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


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_adapter_is_not_loaded(damage: str, good: Path) -> None:
    spoil, message = DAMAGES[damage]
    spoil(good)
    model = llama()
    state = picture(model)
    with pytest.raises(AdapterError, match=message):
        adapter.load(model, good, "bad")
    assert picture(model) == state


def test_wrong_base_is_refused_by_load(good: Path) -> None:
    model = llama(seed=5)
    state = picture(model)
    with pytest.raises(AdapterError, match="another base model"):
        adapter.load(model, good, "sql")
    assert picture(model) == state
    assert adapter.names(adapter.load(model, good, "sql", verify=False)) == ["sql"]


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
    model = adapter.from_pretrained(model=llama(), model_id="me/sql", adapter_name="sql", is_trainable=True)
    assert adapter.names(model) == ["sql"]
    assert any(weight.requires_grad for weight in model.parameters())
    assert len(asked) == 1


def test_offline_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: Any, **options: Any) -> str:
        raise LocalEntryNotFoundError("Cannot find the snapshot.\nmore\nlines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        AdapterError, match=r"^me/sql is not a local folder and .*Cannot find the snapshot\); check"
    ) as error:
        adapter.load(llama(), "me/sql", "a")
    assert "\n" not in str(error.value)
    with pytest.raises(AdapterError, match="no such directory"):
        adapter.load(llama(), "no-such-folder", "a")
