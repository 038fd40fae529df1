"""Messages reach the chat template in training and in contexts as they do in vLLM's server."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any
from unittest.mock import MagicMock

import pytest
from vllm.renderers.chat_utils import parse_chat_messages

from icarus.chat_template import Codec
from icarus.context import Specialists
from tiny_models import tiny, tiny_tokenizer

# Shows all that a template could see of a message, and what is no text as JSON.
REVEALING = (
    "{% for m in messages %}{% for key in ('role', 'content', 'tool_calls', 'tool_call_id', 'name', 'reasoning', "
    "'reasoning_content', 'weight') %}{% if key in m %}{{ key }}={{ m[key] | tojson }} {% endif %}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}"
)


def call(**function: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "f", **function}}


ASSISTANT: dict[str, dict[str, Any]] = {
    "null content": {"content": None, "tool_calls": [call(arguments="{}")]},
    "no content": {"tool_calls": [call(arguments="{}")]},
    "empty content": {"content": "", "tool_calls": [call(arguments={})]},
    "arguments as JSON text": {"content": "a", "tool_calls": [call(arguments=json.dumps({"x": [1, None]}))]},
    "arguments as an object": {"content": "a", "tool_calls": [call(arguments={"x": [1, None]})]},
    "no arguments": {"content": "a", "tool_calls": [call()]},
    "empty arguments": {"content": "a", "tool_calls": [call(arguments="")]},
    "no calls": {"content": "a", "tool_calls": []},
    "null calls": {"content": "a", "tool_calls": None},
    "reasoning": {"content": "a", "reasoning": "hm"},
    "a name": {"content": "a", "name": "x"},
    "a null name": {"content": "a", "name": None},
}


@pytest.mark.parametrize("case", ASSISTANT)
def test_one_rendering(case: str) -> None:
    messages: list[Any] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", **ASSISTANT[case]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    tokenizer = tiny_tokenizer(REVEALING)
    served, *_ = parse_chat_messages(deepcopy(messages), MagicMock(multimodal_config=None), "string")
    want = tokenizer.apply_chat_template(served, tokenize=False)
    assert Codec(tokenizer).render(messages) == want
    context = Specialists(tiny(), tokenizer).context().append(messages)
    assert context.token_ids == tokenizer(want)["input_ids"]
    assert messages[1] == {"role": "assistant", **ASSISTANT[case]}  # the caller's are left as they are
