"""A model without weights, for tests of what compares tokens."""

from __future__ import annotations

Speaker = tuple[str, int]
TIED = 99
"""A token that is nearly as good as the right one."""


class Arithmetic:
    """A model whose next token is computed from what is before it."""

    def tokens(self, speaker: Speaker, prompt: list[int], likely: list[int]) -> list[int]:
        return self.answer(speaker, prompt, len(likely))

    def answer(self, speaker: Speaker, prompt: list[int], count: int) -> list[int]:
        told = list(prompt)
        for _ in range(count):
            told.append((sum(told) * 7 + 31 * speaker[1] + len(speaker[0])) % 90)
        return told[len(prompt) :]

    def scores(self, speaker: Speaker, prompt: list[int]) -> list[float]:
        return [-float(token + speaker[1]) for token in prompt[1:]]

    def gap(self, speaker: Speaker, prompt: list[int], token: int) -> float:
        return 5e-5 if token == TIED else 1.0
