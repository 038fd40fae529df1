"""From messages and text to tokens and back: the same for training rows, contexts and scores.

What begins a text (BOS) is the tokenizer's own choice and stands there once, as vLLM's server has it: for text it is
what the tokenizer puts before it, for messages what the chat template writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from icarus.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
"""``{"role": ..., "content": ...}``, and what else the chat template reads."""

_PROBE = "a"


class Codec:
    """A tokenizer and its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer

    def render(self, messages: Sequence[Message], tools: list[Any] | None = None, *, header: bool = False) -> str:
        """The chat template's text of these messages; ``header`` adds what an answer begins with.

        Raises:
            InputError: there is no chat template, or it refuses these messages.
        """
        if not self.tokenizer.chat_template:
            raise InputError("This base model's tokenizer has no chat template; give text instead of messages.")
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [*messages], tools=tools, tokenize=False, add_generation_prompt=header
                )
            )
        except Exception as error:  # templates are programs of their own and raise what they like
            raise InputError(f"The chat template refuses these messages: {str(error).rstrip('.')}.") from error

    def encode(self, text: str, *, opening: bool = False, ending: bool = False) -> list[int]:
        """Tokens of a text, and of nothing that the tokenizer would put before or behind it.

        ``opening`` puts BOS before it, ``ending`` EOS behind it, where the tokenizer has one and the text has not yet.
        A rendered chat has both already.
        """
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        begin, end = self.beginning if opening else [], self.end if ending else []
        begin = [] if ids[: len(begin)] == begin else begin
        return [*begin, *ids, *([] if ids[-1:] == end else end)]

    @property
    def end(self) -> list[int]:
        """The token that ends a text: EOS, or none."""
        return [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]

    @cached_property
    def beginning(self) -> list[int]:
        """The tokens that this tokenizer puts before a text: BOS, or nothing."""
        plain, whole = (self.tokenizer(_PROBE, add_special_tokens=special)["input_ids"] for special in (False, True))
        starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        return list(whole[: next(starts, 0)])

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of tokens; special tokens are left out unless ``special``."""
        return str(self.tokenizer.decode([*tokens], skip_special_tokens=not special))
