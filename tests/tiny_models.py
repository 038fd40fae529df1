"""Tiny random models of many families, random adapters on them, and a tiny chat tokenizer; all built offline."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from reference import Shape

VOCAB = 128
WINDOW = 6
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "mistral": {"sliding_window": WINDOW},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": _MIXED, "query_pre_attn_scalar": 16},
    "phi3": {},
    "granite": {"attention_multiplier": 0.25, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "olmo2": {},
}
_TARGETS = {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"}


def tiny(
    family: str = "llama", *, seed: int = 0, attention: str = "sdpa", dtype: Any = torch.float32, **overrides: Any
) -> Any:
    """A random causal LM in evaluation mode whose every parameter matters (norms and biases too).

    A size that is None is left out.
    """
    settings = {**_SIZES, **FAMILIES.get(family, {}), **overrides}
    config = AutoConfig.for_model(family, **{k: v for k, v in settings.items() if v is not None or k not in _SIZES})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 if parameter.dim() > 1 else parameter + noise * 0.1)
    return model.to(dtype).eval()


def with_adapters(model: nn.Module, names: Iterable[str] = ("one", "two"), seed: int = 1, **lora: Any) -> Any:
    """Random LoRA, with B far from zero, on every projection that feeds neither K nor V."""
    present = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    settings = {"r": 4, "lora_alpha": 8, "target_modules": sorted(_TARGETS & present), **lora}
    adapted: Any = model
    for name in names:
        config = LoraConfig(task_type="CAUSAL_LM", **settings)
        if not isinstance(adapted, PeftModel):
            adapted = get_peft_model(model, config, adapter_name=name)
        else:
            adapted.add_adapter(name, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return adapted.eval()


def tokens(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randint(4, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
_LETTERS = ["\n", *map(chr, range(32, 127)), *map(chr, range(0x3B1, 0x3B1 + VOCAB - len(SPECIAL) - 96))]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3's: what an earlier answer thought is dropped when a later user message follows.
STRIPPING = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set text = m['content'] %}"
    "{% if m['role'] == 'assistant' and loop.index0 < ns.last %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One character, one token, so that every id has one text; ``<|im_end|>`` is EOS. No BOS."""
    inner = Tokenizer(models.WordLevel({t: i for i, t in enumerate(SPECIAL + _LETTERS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


# ------------------------------------------------------------------------------- what tests/reference.py takes


def lora_of(model: Any, adapter: str) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """An attached adapter as plain tensors, by the names of the projections."""
    return {
        path.removeprefix("base_model.model."): (
            part.lora_A[adapter].weight.detach(),
            part.lora_B[adapter].weight.detach(),
            part.scaling[adapter],
        )
        for path, part in model.named_modules()
        if adapter in getattr(part, "lora_A", ())
    }


def shape_of(config: Any) -> Shape:
    return Shape(
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        theta=config.rope_parameters["rope_theta"],
        eps=config.rms_norm_eps,
    )
