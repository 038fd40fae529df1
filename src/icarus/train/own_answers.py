"""On-policy distillation: answers that the student samples, in place of those of the data.

TRL's DistillationTrainer does this for ordinary models. Where it runs the student (generation, and the hidden states of
its loss) are private methods that know one stream, so there is no seam for two.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from icarus.streams import IGNORED, EncoderCache, TwoStreams


def prompts(labels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> list[list[int]]:
    """What stands before the last answer of each row, all (B, T), padded on the right."""
    rows = []
    for own, ids, real in zip(labels.tolist(), input_ids.tolist(), attention_mask.tolist(), strict=True):
        end = sum(real)
        while end > 1 and own[end - 1] == IGNORED:  # what the template writes behind it
            end -= 1
        while end > 1 and own[end - 1] != IGNORED:
            end -= 1
        rows.append(ids[:end])
    return rows


@torch.no_grad()
def sample(
    streams: TwoStreams,
    adapter: str,
    prompts: Sequence[Sequence[int]],
    *,
    ends: Collection[int],
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[list[int]]:
    """An answer of the specialist to each prompt, with the end token (of ``ends``) if it came to that."""
    width = max(map(len, prompts))
    padded = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]  # nobody attends to padding
    ids = torch.tensor(padded, device=generator.device)
    cache = EncoderCache(padding=torch.tensor([width - len(prompt) for prompt in prompts], device=generator.device))
    if width > 1:
        streams.encode(ids[:, :-1], cache)
    token, answers = ids[:, -1:], [list[int]() for _ in prompts]
    for _ in range(max_new_tokens):
        logits, _base = streams.step(token, cache, adapter)
        token = torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)
        for answer, said in zip(answers, token[:, 0].tolist(), strict=True):
            if not answer or answer[-1] not in ends:
                answer.append(said)
        if all(answer[-1] in ends for answer in answers):
            break
    return answers
