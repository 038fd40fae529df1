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

__all__ = ["CONFIG", "CONVENTIONAL", "ICARUS", "WEIGHTS", "Case", "Outcome", "cases"]


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
