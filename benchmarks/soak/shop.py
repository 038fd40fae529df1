"""A base model and adapters on disk: tiny and random, or the shipped specialists with their base model."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from icarus import adapter, base_model, packaged_model, shipped_specialists

VERSIONS = 3
"""Sets of weights of each adapter, which replace one another."""

RANK = 8
SPECIALISTS, CONVENTIONAL = ("sql", "chat", "plan"), ("plain", "wide")
VOCABULARY = 128
WORDS = range(4, VOCABULARY)  # token ids that are text

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Shop:
    """What an engine serves and what the reference loads."""

    base: Path
    specialists: Mapping[str, list[Path]]
    """Folders of the versions of each ICaRus adapter."""
    conventional: Mapping[str, list[Path]]
    """The same of each conventional adapter."""

    def folder(self, name: str, version: int) -> Path:
        """Of one version of an adapter."""
        return ({**self.specialists, **self.conventional})[name][version]

    def as_json(self) -> dict[str, Any]:
        """For another process; see ``from_json``."""
        return {
            "base": str(self.base),
            "specialists": {name: [*map(str, folders)] for name, folders in self.specialists.items()},
            "conventional": {name: [*map(str, folders)] for name, folders in self.conventional.items()},
        }

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Shop:
        """What ``as_json`` gave."""
        kinds = {
            kind: {name: [*map(Path, folders)] for name, folders in given[kind].items()}
            for kind in ("specialists", "conventional")
        }
        return cls(base=Path(given["base"]), **kinds)


def tiny(folder: Path) -> Shop:
    """Three layers of random float32 weights; adapters that change most predictions. Deterministic."""
    base = folder / "base"
    tiny_model().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    return _with_adapters(base, folder, tiny_model, scale=0.1)


def packaged(folder: Path) -> Shop:
    """The base model of the shipped specialists, these in several versions, and random conventional adapters."""
    base = base_model.folder(packaged_model.PREPARED)

    def fresh() -> Any:
        return base_model.load(packaged_model.PREPARED, dtype="float32")[0]

    specialists = {
        name: [_scaled(source, folder / f"{name}-{version}", 1 - 0.4 * version) for version in range(VERSIONS)]
        for name, source in shipped_specialists.shipped().items()
    }
    conventional = _conventional(folder, fresh, 0.02, ("plain",))
    return Shop(base=base, specialists=specialists, conventional=conventional)


def tiny_model() -> Any:
    """Of sizes that vLLM's CPU attention takes; every parameter matters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 if parameter.dim() > 1 else parameter + noise * 0.1)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One character, one token, so that every id has one text."""
    letters = ["\n", *map(chr, range(32, 127)), *map(chr, range(0x3B1, 0x3B1 + VOCABULARY - len(_SPECIAL) - 96))]
    inner = Tokenizer(models.WordLevel({t: i for i, t in enumerate(_SPECIAL + letters)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHATML
    return tokenizer


def any_tokens(rng: random.Random, count: int) -> list[int]:
    """Tokens of the tiny model that are text."""
    return [rng.choice(WORDS) for _ in range(count)]


def _with_adapters(base: Path, folder: Path, fresh: Any, scale: float) -> Shop:
    specialists = {}
    for index, name in enumerate(SPECIALISTS):
        specialists[name] = [
            adapter.save(_random(adapter.attach(fresh(), rank=RANK), index * VERSIONS + version, scale), target)
            for version in range(VERSIONS)
            for target in [folder / f"{name}-{version}"]
        ]
    return Shop(base=base, specialists=specialists, conventional=_conventional(folder, fresh, scale, CONVENTIONAL))


def _conventional(folder: Path, fresh: Any, scale: float, names: tuple[str, ...]) -> dict[str, list[Path]]:
    """On all linear projections; 'wide' on the embeddings and the head, which vLLM treats apart."""
    saved: dict[str, list[Path]] = {}
    for index, name in enumerate(names):
        targets = ["embed_tokens", "lm_head", "q_proj"] if name == "wide" else None
        saved[name] = [
            adapter.save_conventional(
                _random(
                    adapter.attach_conventional(fresh(), rank=RANK, targets=targets), 1000 + index * VERSIONS + v, scale
                ),
                folder / f"{name}-{v}",
            )
            for v in range(VERSIONS)
        ]
    return saved


def _random(model: Any, seed: int, scale: float) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def _scaled(source: Path, target: Path, factor: float) -> Path:
    """A copy of an adapter whose effect is weaker."""
    shutil.copytree(source, target)
    file = target / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] * factor}), encoding="utf-8")
    return target
