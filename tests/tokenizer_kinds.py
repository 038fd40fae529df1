"""Small tokenizers of the kinds that language models have, trained offline, and chat templates in their manners.

SentencePiece models are trained by sentencepiece and read by Transformers as Llama 2's and Gemma's are; the others are
built with the tokenizers library.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

BEGIN, END = "<s>", "</s>"
PLAIN = ["<|im_start|>", "<|im_end|>"]
SWALLOWING = ["<|user|>", "<|assistant|>", "<|end|>"]  # and the white space behind them, as Phi-3's
_CORPUS = [
    "Hello world, how are you? I am fine, and 12 + 12 = 24.",
    "[INST] What is the answer? [/INST] The answer is 42. ",
    "user assistant system\nHello\n\nHello there",
    "  def f(x):\n\treturn x",
    "naïve café",
] * 20
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _finished(tokenizer: Any) -> Any:
    tokens = [AddedToken(token, special=True, normalized=False) for token in PLAIN]
    tokens += [AddedToken(token, special=True, normalized=False, rstrip=True) for token in SWALLOWING]
    tokenizer.add_special_tokens({"extra_special_tokens": tokens})
    return tokenizer


@cache
def _trained(kind: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_CORPUS),
            model_prefix=f"{folder}/tokenizer",
            vocab_size=340,
            model_type=kind,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        return Path(folder, "tokenizer.model").read_bytes()


def _sentencepiece(kind: str, like: str, **config: Any) -> Any:
    settings = {"tokenizer_class": like, "bos_token": BEGIN, "eos_token": END, "unk_token": "<unk>", **config}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(_trained(kind))
        Path(folder, "tokenizer_config.json").write_text(json.dumps(settings))
        return _finished(AutoTokenizer.from_pretrained(folder))


def _bpe(byte_fallback: bool, normalizer: Any, pre_tokenizer: Any, decoder: Any, begin: bool = True) -> Any:
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=byte_fallback, fuse_unk=True))
    # SentencePiece trains within words and tokenizes without splitting into words.
    inner.pre_tokenizer = pre_tokenizers.Metaspace() if byte_fallback else pre_tokenizer
    alphabet = [] if byte_fallback else pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", BEGIN, END]
    trainer = trainers.BpeTrainer(
        vocab_size=400 - 240 * byte_fallback, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(_CORPUS, trainer)
    if byte_fallback:
        saved = json.loads(inner.to_str())
        vocabulary = saved["model"]["vocab"]
        vocabulary.update({byte: len(vocabulary) + i for i, byte in enumerate(_BYTES)})
        saved["pre_tokenizer"] = None
        inner = Tokenizer.from_str(json.dumps(saved))
        if pre_tokenizer:
            inner.pre_tokenizer = pre_tokenizer
    if normalizer:
        inner.normalizer = normalizer
    inner.decoder = decoder
    if begin:
        inner.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 1)])
    return _finished(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token=BEGIN, eos_token=END))


def _spaces(strip: bool) -> decoders.Sequence:
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)


def _prepending() -> Any:
    """As Llama 2's and Mistral's tokenizer.json: a space before every text between added tokens."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _bpe(True, spaces, None, _spaces(strip=True))


def _first() -> Any:
    """As Llama's with legacy=False: a space at the very beginning only."""
    return _bpe(True, None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), _spaces(strip=True))


def _byte_level(prefix: bool) -> Any:
    return _bpe(False, None, pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoders.ByteLevel(), begin=False)


def _llama_3() -> Any:
    split = pre_tokenizers.Split(Regex(_LLAMA_3), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _bpe(False, None, pre_tokenizers.Sequence([split, bytes_]), decoders.ByteLevel())


def _qwen() -> Any:
    """As Qwen 2's and 3's: text is brought into NFC first."""
    split = pre_tokenizers.Split(Regex(_LLAMA_3), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Sequence([split, bytes_])
    return _bpe(False, normalizers.NFC(), words, decoders.ByteLevel(), begin=False)


def _gemma() -> Any:
    """As Gemma's tokenizer.json: spaces are letters, and none is put before a text."""
    words = pre_tokenizers.Split(" ", "merged_with_previous")
    return _bpe(True, normalizers.Replace(" ", "▁"), words, _spaces(strip=False))


KINDS: dict[str, Callable[[], Any]] = {
    "SentencePiece BPE": lambda: _sentencepiece("bpe", "LlamaTokenizer"),
    "SentencePiece unigram": lambda: _sentencepiece("unigram", "LlamaTokenizer"),
    "SentencePiece, no space first": lambda: _sentencepiece("bpe", "GemmaTokenizer"),
    "byte fallback, space first": _first,
    "byte fallback, space behind every added token": _prepending,
    "byte-level BPE": lambda: _byte_level(prefix=False),
    "byte-level BPE, space first": lambda: _byte_level(prefix=True),
    "byte-level BPE, words and numbers": _llama_3,
    "byte-level BPE, NFC": _qwen,
    "byte fallback, no space first": _gemma,
}


@cache
def tokenizer(kind: str, template: str | None = None) -> Any:
    small = KINDS[kind]()
    small.chat_template = TEMPLATES[template] if template else None
    return small


_FOR = "{% for m in messages %}"
TEMPLATES = {
    "ChatML": _FOR + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "Llama 2": _FOR + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "Mistral": "{{ bos_token }}" + _FOR + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + eos_token }}{% endif %}{% endfor %}",
    "Phi-3": _FOR + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "Vicuna": _FOR + "{% if m.role == 'user' %}{{ 'USER: ' + m.content + '\n' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
}
