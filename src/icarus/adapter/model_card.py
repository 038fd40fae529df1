"""The model card of an adapter directory: what it is, and that it must not be loaded as a plain LoRA."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def text(config: Mapping[str, Any], extra: Mapping[str, Any]) -> str:
    """The card for an adapter with this config; ``extra`` adds to its front matter, where ``tags`` are joined."""
    tags = ["icarus", "lora", "shared-kv-cache", *extra.get("tags", [])]
    return _CARD.format(**_words(config, {**extra, "tags": tags}), mark=config["icarus"]["base_fingerprint"])


def conventional(config: Mapping[str, Any]) -> str:
    """The card for a conventional adapter, in place of PEFT's form to fill in."""
    return _CONVENTIONAL.format(**_words(config, {"tags": ["lora"]}))


def _words(config: Mapping[str, Any], front: Mapping[str, Any]) -> dict[str, Any]:
    from huggingface_hub import ModelCardData

    base = config.get("base_model_name_or_path")
    fields: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation", **front}
    if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base):  # the Hub takes no local paths here
        fields.setdefault("base_model", base)
    targets = config["target_modules"]
    return {
        "front": ModelCardData(**fields).to_yaml(),
        "base": base or "(unnamed)",
        "rank": config["r"],
        "targets": targets if isinstance(targets, str) else ", ".join(sorted(targets)),
    }


_CONVENTIONAL = """---
{front}
---

# LoRA adapter

A conventional adapter for the base model `{base}`: LoRA (rank {rank}) on {targets}.

It was trained with `icarus train --method lora`, and PEFT and vLLM load it as they load any other. It changes K and V,
so it shares a KV cache with no other model. A specialist that learns from it can: `icarus distill`.
"""

_CARD = """---
{front}
---

# ICaRus adapter

A task specialist for the base model `{base}`: LoRA (rank {rank}) on {targets}, trained as the *logical decoder* of
ICaRus (arXiv 2603.13281). The base model writes the KV cache and this adapter only reads it, so any number of such
specialists share one cache.

**Do not load it as a plain LoRA.** PEFT, vLLM and other loaders without ICaRus accept these files, run, and give
answers that are subtly wrong, with no error: in plain LoRA the adapter's hidden states flow into K and V of later
layers, which this adapter was never trained for.

## How to load it

```python
import icarus

team = icarus.Specialists.load("{base}", {{"NAME": "PATH_OR_HUB_ID"}})
print(team.context().append("...").generate("NAME").text)
```

```
icarus verify PATH
```

It fits the base weights with fingerprint `{mark}` and no others; `icarus` checks that.
"""
