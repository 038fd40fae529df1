"""Tiny models of many families, adapters on them whose weights do something, and ways to damage a saved one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from icarus import adapter

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


def qwen2_moe() -> Any:
    """Has a router that is a linear module: shared_expert_gate."""
    moe = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**SIZES, **moe, num_experts_per_tok=2))


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


def picture(model: nn.Module) -> tuple[Any, ...]:
    """All that a failed call could have changed."""
    modules = [(name, id(module), module.training, sorted(vars(module))) for name, module in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad, p.detach().sum().item()) for name, p in model.named_parameters()]
    active = model.active_adapters if isinstance(model, PeftModel) else None
    return modules, parameters, adapter.names(model), active, model(IDS).logits.sum().item()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def whole(directory: Path, model: PeftModel) -> bool:
    if not adapter.is_icarus(directory):
        return False
    loaded = adapter.load(llama(), directory, "default")
    return equal(weights(loaded, "default"), weights(model, "default"))


# ---------------------------------------------------------------------------------------------- damage

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
        stored = load_file(file)
        change(stored)
        save_file(stored, file)

    return damage


def both(*damages: Damage) -> Damage:
    return lambda directory: [damage(directory) for damage in damages]


def kv_tensors(stored: dict[str, Tensor]) -> None:
    stored[O_PROJ.replace("o_proj", "k_proj") + ".lora_A.weight"] = torch.zeros(4, 32)
    stored[O_PROJ.replace("o_proj", "k_proj") + ".lora_B.weight"] = torch.zeros(16, 4)


def rank_of_o_proj(stored: dict[str, Tensor]) -> None:
    stored[f"{O_PROJ}.lora_A.weight"] = torch.zeros(3, 32)
    stored[f"{O_PROJ}.lora_B.weight"] = torch.zeros(32, 3)


def poison(value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(stored: dict[str, Tensor]) -> None:
        stored[f"{O_PROJ}.lora_A.weight"][1, 2] = value

    return change


def cut(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def pickle_only(directory: Path) -> None:
    torch.save({}, directory / "adapter_model.bin")
    (directory / "adapter_model.safetensors").unlink()


def pipe(directory: Path) -> None:
    (directory / "adapter_config.json").unlink()
    os.mkfifo(directory / "adapter_config.json")


def folder_of_weights(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()
    (directory / "adapter_model.safetensors").mkdir()


def huge_rank(directory: Path) -> None:
    """Sparse files, of more than fits into memory."""
    rank, names = 2**34, [f"{O_PROJ}.lora_{half}.weight" for half in "AB"]
    shapes, size = ([rank, 32], [32, rank]), rank * 32 * 4
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [number * size, (number + 1) * size]}
        for number, (name, shape) in enumerate(zip(names, shapes, strict=True))
    }
    text = json.dumps(header).encode()
    with (directory / "adapter_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2 * size)
    setting(r=rank, target_modules=["layers.0.self_attn.o_proj"])(directory)


def two_lines(stored: dict[str, Tensor]) -> None:
    stored["x\nicarus: all is well"] = torch.ones(2)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "directory": (lambda d: d.rename(d.parent / "moved"), "no such directory"),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "broken json": (lambda d: (d / "adapter_config.json").write_text("{"), "adapter_config.json is not readable JSON"),
    "deep json": (lambda d: (d / "adapter_config.json").write_text("[" * 100_000), "not readable JSON"),
    "huge config": (lambda d: (d / "adapter_config.json").write_text(" " * 2**24 + "{}"), "16,777,218 bytes long"),
    "config is a pipe": (pipe, "adapter_config.json is missing"),
    "weights are a folder": (folder_of_weights, "adapter_model.safetensors is missing"),
    "binary config": (lambda d: (d / "adapter_config.json").write_bytes(b"\xff\xfe"), "not readable JSON"),
    "config is a list": (lambda d: (d / "adapter_config.json").write_text("[]"), "not a JSON object"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "pickle": (pickle_only, "adapter_model.bin is there, a pickle"),
    "truncated": (cut, "adapter_model.safetensors is truncated"),
    "not safetensors": (lambda d: (d / "adapter_model.safetensors").write_bytes(b"hello"), "not a safetensors file"),
    "no marker": (edit(lambda c: c.pop("icarus")), "plain LoRA; serve it as a conventional adapter, or retrain"),
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
    "unknown init": (setting(init_lora_weights="true"), "init_lora_weights 'true'"),
    "k target": (edit(lambda c: c["target_modules"].append("k_proj")), "target_modules has k_proj"),
    "path of v target": (edit(lambda c: c["target_modules"].append("self_attn.v_proj")), "has self_attn.v_proj"),
    "regex target": (setting(target_modules=r".*proj"), "target_modules has .*proj"),
    "all-linear": (setting(target_modules="all-linear"), "target_modules has all-linear"),
    "bad regex": (setting(target_modules="("), "valid regular expression"),
    "no targets": (setting(target_modules=None), "target_modules names no modules"),
    "rank zero": (setting(r=0), "r is 0"),
    "rank text": (setting(r="4"), "r is '4'"),
    "alpha": (setting(lora_alpha=None), "lora_alpha is None"),
    "alpha nan": (setting(lora_alpha=float("nan")), "lora_alpha is nan"),
    "alpha negative": (setting(lora_alpha=-1), "lora_alpha is -1;"),
    "alpha true": (setting(lora_alpha=True), "lora_alpha is True"),
    "alpha too large": (setting(lora_alpha=10**400), "finite number above 0"),
    "alpha pattern of 0": (setting(alpha_pattern={"o_proj": 0}), "lora_alpha is 0;"),
    "alpha pattern of a word": (setting(alpha_pattern={"o_proj": "3"}), "alpha_pattern has '3' for o_proj"),
    "alpha pattern that is a list": (setting(alpha_pattern=["o_proj"]), "alpha_pattern is .* not an object"),
    "dropout": (setting(lora_dropout=1.0), "lora_dropout is 1.0"),
    "dropout text": (setting(lora_dropout="0"), "lora_dropout is '0'"),
    "dropout nan": (setting(lora_dropout=float("nan")), "lora_dropout is nan"),
    "rslora": (setting(use_rslora="false"), "use_rslora is 'false'; set it to true or false"),
    "fan_in_fan_out": (setting(fan_in_fan_out=0), "fan_in_fan_out is 0"),
    "exclude_modules": (setting(exclude_modules=5), "neither names nor a valid regular expression"),
    "layers": (setting(layers_to_transform="first"), "neither names nor a valid regular expression"),
    "layers_pattern": (setting(layers_to_transform=[0], layers_pattern=["layers", "("]), "valid regular expression"),
    "rank pattern": (setting(rank_pattern={"o_proj": 3}), "o_proj has rank 4 and the config says 3"),
    "rank pattern of 0": (setting(rank_pattern={"o_proj": 0}), "rank_pattern has 0 for o_proj"),
    "rank pattern of true": (setting(rank_pattern={"o_proj": True}), "rank_pattern has True for o_proj"),
    "rank pattern of no regex": (setting(rank_pattern={"(": 4}), "not a valid regular expression"),
    "kv tensors": (tensors(kv_tensors), "weights for model.layers.0.self_attn.k_proj, which feeds K or V"),
    "missing half": (tensors(lambda t: t.pop(f"{O_PROJ}.lora_B.weight")), "lora_B of model.layers.0.self_attn.o_proj"),
    "foreign tensor": (tensors(lambda t: t.update({"lm_head.weight": torch.ones(2)})), "lm_head.weight is not a LoRA"),
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
    "nan": (tensors(poison(float("nan"))), r"o_proj.lora_A.weight holds NaN"),
    "inf": (tensors(poison(float("-inf"))), r"o_proj.lora_A.weight holds NaN or inf"),
    "rank above all dimensions": (huge_rank, "which is more than it has inputs or outputs"),
    "name of two lines": (tensors(two_lines), r"'x\\nicarus: all is well' is not a LoRA weight"),
    "name too long": (tensors(lambda t: t.update({"x" * 10_000: torch.ones(2)})), r"x \.\.\. is not a LoRA weight"),
    "overflow times scale": (setting(lora_alpha=1e300), "times its scale is more than float32 holds"),
    "integers": (
        tensors(lambda t: t.update({f"{O_PROJ}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int8)})),
        "I8 and not floating",
    ),
}


def rename(stored: dict[str, Tensor], old: str, new: str) -> None:
    renamed = {name.replace(old, new): tensor for name, tensor in stored.items()}
    stored.clear()
    stored.update(renamed)


def resize(stored: dict[str, Tensor]) -> None:
    stored[f"{O_PROJ}.lora_A.weight"] = torch.zeros(4, 16)


def drop_module(stored: dict[str, Tensor]) -> None:
    del stored[f"{O_PROJ}.lora_A.weight"], stored[f"{O_PROJ}.lora_B.weight"]


def add_layer(stored: dict[str, Tensor]) -> None:
    for half in "AB":
        stored[O_PROJ.replace("0", "7") + f".lora_{half}.weight"] = stored[f"{O_PROJ}.lora_{half}.weight"].clone()


# What a server is offered as a conventional adapter, and what it says.
CONVENTIONAL_DAMAGES: dict[str, tuple[Damage, str]] = {
    "nan": (tensors(lambda stored: next(iter(stored.values())).fill_(float("nan"))), "holds NaN or infinity"),
    "dora": (setting(use_dora=True), "use_dora is set"),
    "saved modules": (setting(modules_to_save=["lm_head"]), "modules_to_save is"),
    "no alpha": (edit(lambda config: config.pop("lora_alpha")), "lora_alpha is None"),
    "empty file": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""), "is truncated"),
    "rank above r": (setting(r=2), r"has rank \d and the config says 2"),
    "another prefix": (
        tensors(lambda stored: rename(stored, "base_model.model.", "base_model.model.language_model.")),
        "which the base model lacks",
    ),
}
