"""The model card of an adapter directory: what it is, and that it must not be loaded as a plain LoRA."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def text(config: Mapping[str, Any], extra: Mapping[str, Any]) -> str:
    """The card for an adapter with this config; ``extra`` adds to its front matter, where ``tags`` are joined."""
    from huggingface_hub import ModelCardData

    base = config.get("base_model_name_or_path")
    fields: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation"}
    if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base):  # the Hub takes no local paths here
        fields["base_model"] = base
    tags = ["icarus", "lora", "shared-kv-cache", *extra.get("tags", [])]
    return _CARD.format(
        front=ModelCardData(**fields | {**extra, "tags": tags}).to_yaml(),
        base=base or "(unnamed)",
        mark=config["icarus"]["base_fingerprint"],
        rank=config["r"],
        targets=config["target_modules"],
    )


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
