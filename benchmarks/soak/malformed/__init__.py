"""Malformed adapters, each with what is expected of it: 200 and more, the same ones for the same seed.

A case damages a sound adapter, ICaRus or conventional. What is expected holds wherever an adapter can come in: at
``icarus verify``, on the command line of ``icarus serve``, over HTTP and in ``--adapter-dir``.

    case      one way to spoil an adapter, and the outcome that is right
    files     files that are missing, cut, or no files
    config    adapter_config.json as text and as settings
    header    what the safetensors header says of the tensors
    tensors   values, shapes and modules
    bits      single bits, in the header and in numbers
"""

from __future__ import annotations

from benchmarks.soak.malformed import bits, config, files, header, tensors
from benchmarks.soak.malformed.case import CONFIG, CONVENTIONAL, ICARUS, WEIGHTS, Case, Outcome

__all__ = ["CONFIG", "CONVENTIONAL", "ICARUS", "WEIGHTS", "Case", "Outcome", "cases", "some"]

_SOME = (
    "pipe for",
    "/dev/zero for adapter_model",
    "socket for",
    "link to another",
    "first 9 bytes",
    "config deep and whole",
    "config with a byte of Latin-1",
    "r is 4",
    "r is 1000000000",
    "r twice",
    "lora_alpha is nan",
    "a target that takes for ever",
    "use_dora",
    "use_rslora",
    "header length +1",
    "header deep",
    "dtype 'I32'",
    "shape turned",
    "offsets of another tensor",
    "names of another prefix",
    "name with a line break",
    "name of 100,000 letters",
    "all NaN",
    "-infinity as the last number",
    "zeros",
    "both halves of half the rank",
    "a module that is not in the base",
    "a bit of the header's names, 1",
    "a bit of a number's mantissa, 2",
    "an exponent that becomes NaN",
)
"""Parts of the names of cases of a kind each."""


def cases(seed: int = 0) -> list[Case]:
    """All of them; of flipped bits, ``seed`` says which."""
    listed = [
        case.of(kind)
        for kind in (ICARUS, CONVENTIONAL)
        for part in (files.cases(), config.cases(kind), header.cases(), tensors.cases(kind), bits.cases(seed))
        for case in part
    ]
    assert len({case.name for case in listed}) == len(listed), "names are unique"
    return listed


def some() -> list[Case]:
    """A few of each sort, for a short run."""
    return [case for case in cases() if any(part in case.name for part in _SOME)]
