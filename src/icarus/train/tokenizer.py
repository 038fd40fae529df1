"""The tokenizer that training uses: the base model's, by the model's name, and as the settings change it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig

from icarus import base_model, packaged_model
from icarus.chat_template import end_tokens
from icarus.errors import InputError, first_line

logger = logging.getLogger(__name__)


def of_model(model: Any, *, trust: bool) -> Any:
    """By the model's name, as TRL does.

    Raises:
        InputError: the model has no name, or there is no tokenizer under it.
    """
    name = str(getattr(model.config, "_name_or_path", None) or "")
    if not name:
        raise InputError("The model has no name by which to find its tokenizer; give processing_class.")
    try:
        return _load(name, trust=trust)
    except (OSError, ValueError) as error:
        raise InputError(
            f"The tokenizer of {name!r} could not be loaded ({first_line(error)}); give processing_class."
        ) from error


def _load(name: str, *, trust: bool = False) -> Any:
    source = base_model.resolve(name) if name in packaged_model.NAMES else name
    return AutoTokenizer.from_pretrained(source, trust_remote_code=trust)


def change(tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> None:
    """Set chat template, EOS and padding as ``args`` has them; before there are rows, which depend on all three.

    As in TRL, a chat template may come with another tokenizer, whose EOS comes too. Unlike there, no token is added,
    since its embedding would be a change of the base model.

    Raises:
        InputError: there is no such template, or a token is not in the vocabulary.
    """
    if args.chat_template_path is not None:
        _set_template(tokenizer, str(args.chat_template_path))
        _warn(args, "chat template", args.chat_template_path, "vLLM's --chat-template")
    if args.eos_token not in (None, tokenizer.eos_token):
        _set_token(tokenizer, "eos_token", args.eos_token)
        _warn(args, "eos_token", args.eos_token, "stop in its requests")
    if args.pad_token is not None:
        _set_token(tokenizer, "pad_token", args.pad_token)


def ends(model: Any, tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> list[int]:
    """Tokens at which generation stops, and the EOS that the user has set, of which ``change`` warns."""
    own = [] if args.eos_token is None else [tokenizer.get_vocab()[args.eos_token]]
    return [*end_tokens(model.generation_config), *own]


def _set_template(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    if path.endswith((".jinja", ".j2")):
        try:
            tokenizer.chat_template = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"chat_template_path {path} cannot be read ({error}); name a Jinja file.") from error
        return
    try:
        other = _load(path)
        template = other.get_chat_template()
    except (OSError, ValueError) as error:
        raise InputError(
            f"chat_template_path {path!r} is no tokenizer with a chat template ({first_line(error)}); name a .jinja "
            "file, or the folder or hub id of such a tokenizer."
        ) from error
    vocabulary = tokenizer.get_vocab()
    written = [token.content for token in other.added_tokens_decoder.values() if token.content in template]
    if lacking := [token for token in (*written, other.eos_token) if token and token not in vocabulary]:
        raise InputError(
            f"chat_template_path {path!r} needs {lacking[0]!r}, which this base model's tokenizer lacks; give a .jinja "
            "file that writes tokens it has."
        )
    tokenizer.chat_template = template
    if other.eos_token:
        tokenizer.eos_token = other.eos_token


def _set_token(tokenizer: PreTrainedTokenizerBase, name: str, token: str) -> None:
    if token not in tokenizer.get_vocab():
        raise InputError(f"{name} {token!r} is not in this tokenizer's vocabulary; give a token that is.")
    setattr(tokenizer, name, token)


def _warn(args: SFTConfig, what: str, value: object, where: str) -> None:
    if args.process_index == 0:
        logger.warning(
            "An adapter holds no tokenizer: give the %s %r to those who use it too (%s).", what, value, where
        )
