"""Three models take turns in one conversation, and none of them prefills what the others said.

Against a running server (make serve); needs the openai package, which comes with vLLM:

    .venv/bin/python examples/handover.py http://localhost:8000/v1 smollm2-135m-wikisql planner sql
"""

from __future__ import annotations

import os
import sys
from typing import Any

from openai import OpenAI

address, *models = sys.argv[1:] or ["http://localhost:8000/v1", "smollm2-135m-wikisql", "planner", "sql"]
client = OpenAI(base_url=address, api_key=os.environ.get("OPENAI_API_KEY", "none"))
system = "You query one table. Columns: date, opponent, score, place, attendance, referee, weather, season, result."
messages: list[Any] = [
    {"role": "system", "content": system},
    {"role": "user", "content": "What was the score against Chelsea?"},
]
for turn in range(2 * len(models)):
    model = models[turn % len(models)]
    reply = client.chat.completions.create(model=model, messages=messages, max_tokens=64, temperature=0)
    usage: Any = reply.usage
    print(f"{model}: {usage.prompt_tokens} prompt tokens, {usage.prompt_tokens_details.cached_tokens} of them cached")
    messages += [
        {"role": "assistant", "content": reply.choices[0].message.content},
        {"role": "user", "content": "Go on."},
    ]
