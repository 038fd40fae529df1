"""Training data: which token carries loss, that training sees the tokens of a ``Context``, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from icarus.chat_template import Codec
from icarus.context import Context, Specialists
from icarus.errors import DataError, InputError
from icarus.streams import IGNORED
from icarus.train import data
from tiny_models import CHATML, STRIPPING, tiny, tiny_tokenizer

Row = dict[str, Any]
END = "<|im_end|>"


def chat(*turns: str) -> list[dict[str, str]]:
    """``chat("u:hi", "a:ho")``"""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


def header(*turns: str) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}{END}\n" for m in chat(*turns)) + "<|im_start|>assistant\n"


def pieces(columns: Row, tokenizer: Any) -> list[tuple[str, bool]]:
    """The example's texts, cut where loss begins and ends, each with whether it carries loss."""
    out: list[tuple[list[int], bool]] = []
    for token, label in zip(columns["input_ids"], columns["labels"], strict=True):
        assert label in (IGNORED, token)
        if not out or out[-1][1] != (label != IGNORED):
            out.append(([], label != IGNORED))
        out[-1][0].append(token)
    return [(tokenizer.decode(tokens), loss) for tokens, loss in out]


# ------------------------------------------------------------------------------------ which token carries loss

FORMS = {
    "text": ({"text": "abc"}, [("a", False), ("bc" + END, True)]),
    "completion": ({"prompt": "1+1=", "completion": "2"}, [("1+1=", False), ("2" + END, True)]),
    "chat completion": (
        {"prompt": chat("s:x", "u:hi"), "completion": chat("a:ho")},
        [(header("s:x", "u:hi"), False), ("ho" + END, True)],
    ),
    "completion of several messages": (
        {"prompt": chat("u:1", "a:2", "u:3"), "completion": chat("a:4", "u:5", "a:6")},
        [
            (header("u:1", "a:2", "u:3"), False),
            ("4" + END, True),
            ("\n" + header("u:5"), False),
            ("6" + END, True),
        ],
    ),
    "messages": (
        {"messages": chat("s:x", "u:hi", "a:ho", "u:again", "a:no")},
        [
            (header("s:x", "u:hi"), False),
            ("ho" + END, True),
            ("\n" + header("u:again"), False),
            ("no" + END, True),
        ],
    ),
    "what follows the last answer is not read": ({"messages": chat("u:a", "a:b", "u:c")}, None),
    "no answer, no loss": ({"messages": chat("u:hi")}, [(header("u:hi").removesuffix(header()), False)]),
}


@pytest.mark.parametrize("form", FORMS)
def test_loss_is_on_what_the_assistant_says_and_on_its_end(form: str, tokenizer: Any) -> None:
    row, wanted = FORMS[form]
    wanted = wanted or [(header("u:a"), False), ("b" + END, True)]
    columns = data.tokenize(row, Codec(tokenizer), None)
    assert pieces(columns, tokenizer) == wanted
    assert columns["position_ids"] == list(range(len(columns["input_ids"])))
    assert not any(columns["branch_ids"])


@pytest.mark.parametrize(
    ("prompt", "answers"),
    [("a:", ["one", "two2", "x"]), (chat("u:a"), [chat("a:one"), chat("a:two2"), chat("a:x", "u:y", "a:z")])],
    ids=["text", "chat"],
)
def test_completions_are_branches_behind_one_prompt(prompt: Any, answers: list[Any], tokenizer: Any) -> None:
    columns = data.tokenize({"prompt": prompt, "completions": answers}, Codec(tokenizer), None)
    alone = [data.tokenize({"prompt": prompt, "completion": answer}, Codec(tokenizer), None) for answer in answers]
    shared = alone[0]["labels"].index(next(t for t in alone[0]["labels"] if t != IGNORED))
    want: Row = {name: values[:shared] for name, values in alone[0].items()}
    for branch, row in enumerate(alone, 1):
        for name in ("input_ids", "labels", "position_ids"):
            want[name] = want[name] + row[name][shared:]
        want["branch_ids"] = want["branch_ids"] + [branch] * (len(row["input_ids"]) - shared)
    assert columns == want


def test_completions_that_do_not_share_their_prompt_are_refused(tokenizer: Any) -> None:
    row = {"prompt": chat("u:a"), "completions": [chat("u:b", "a:c"), chat("u:d", "a:e")]}
    with pytest.raises(DataError, match="completions"):
        data.tokenize(row, Codec(tokenizer), None)


@pytest.mark.parametrize(
    "row", [{"prompt": "abc", "completion": "defg"}, {"prompt": "abc", "completions": ["d", "ef"]}]
)
@pytest.mark.parametrize("limit", [3, 4, 5, 100])
def test_no_position_from_max_length_on(row: Row, limit: int, tokenizer: Any) -> None:
    whole, cut = (data.tokenize(row, Codec(tokenizer), most) for most in (None, limit))
    kept = [i for i, position in enumerate(whole["position_ids"]) if position < limit]
    assert cut == {name: [values[i] for i in kept] for name, values in whole.items()}
    assert max(cut["position_ids"]) == min(limit - 1, max(whole["position_ids"]))


# --------------------------------------------------------------------- training sees what a Context computes


@pytest.fixture(scope="module")
def merging() -> PreTrainedTokenizerFast:
    """BPE with merges that reach over every boundary, and a BOS: a text's tokens depend on where it was cut."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(split=False), decoders.Metaspace()
    special = ["<s>", "<|im_start|>", END, "<unk>"]
    corpus = ["assistant\nabab", "user\nabab", "b a\nb abab", "system"] * 9
    inner.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=100, special_tokens=special, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token=END, extra_special_tokens=special[1:2]
    )
    tokenizer.chat_template = CHATML
    whole, *parts = (tokenizer(text)["input_ids"] for text in ("abab", "aba", "b"))
    assert whole != [*parts[0], *parts[1]]
    return tokenizer


@pytest.mark.parametrize(
    ("row", "appended"),
    [
        ({"prompt": "abab b ab", "completion": "ab a"}, ["abab b ab"]),
        ({"messages": chat("u:ab", "a:abab")}, [chat("u:ab")]),
        ({"messages": chat("s:b", "u:ab", "a:ab b", "u:a", "a:b")}, [chat("s:b", "u:ab"), chat("u:a")]),
    ],
    ids=["text", "chat", "long chat"],
)
def test_a_context_appends_and_generates_the_tokens_of_training(
    row: Row, appended: list[Any], merging: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = data.tokenize(row, Codec(merging), None)
    ids, labels = columns["input_ids"], columns["labels"]
    context = Specialists(tiny(vocab_size=len(merging)), merging).context()

    def taught(self: Context, speaker: str | None) -> torch.Tensor:
        at = len(self.token_ids)
        assert labels[at] != IGNORED, "a prediction at a token that training did not teach"
        return torch.nn.functional.one_hot(torch.tensor([ids[at]]), len(merging)).float()

    monkeypatch.setattr(Context, "_next_logits", taught)
    for content in appended:
        context.append(content)
        assert context.generate(max_new_tokens=99).finish_reason == "stop"
    assert context.token_ids == ids


# ------------------------------------------------------------------------------------------- what is refused


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


GOOD: Row = {"prompt": "a", "completion": "b"}
CHAT: Row = {"messages": chat("u:a", "a:b")}
BAD: dict[str, tuple[list[Any], int, str]] = {  # rows; the line that must be named; what else
    "bad JSON": ([GOOD, '{"prompt": '], 2, "not JSON .* column 11"),
    "blank lines count": (["", GOOD, "  ", "{"], 4, "not JSON"),
    "not an object": ([GOOD, [1]], 2, "list"),
    "missing field": ([GOOD] * 6 + [{"prompt": "a"}] + [GOOD], 7, "'completion'"),
    "null field": ([GOOD, {"prompt": "a", "completion": None}], 2, "'completion'"),
    "another form": ([GOOD, CHAT], 2, "'prompt'"),
    "unknown form": ([{"question": "a", "answer": "b"}], 1, "answer, question"),
    "empty object": ([{}], 1, "nothing"),
    "empty text": ([{"text": "a"}, {"text": ""}], 2, "'text' is empty"),
    "empty completion": ([{"prompt": "a", "completion": ""}], 1, "'completion' is empty"),
    "number": ([{"text": 5}], 1, "'text'"),
    "text of messages": ([{"text": CHAT["messages"]}], 1, "'text'"),
    "no messages": ([{"messages": []}], 1, "'messages'"),
    "messages as text": ([{"messages": "hi"}], 1, "'messages'"),
    "message without role": ([CHAT, {"messages": [{"content": "a"}]}], 2, "'role'"),
    "message that is no object": ([{"messages": ["a"]}], 1, "'role'"),
    "content that is no text": ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], 1, "'content'"),
    "text and messages": ([{"prompt": "a", "completion": chat("a:b")}], 1, "'prompt' and 'completion'"),
    "text and messages in completions": ([{"prompt": "a", "completions": ["b", chat("a:b")]}], 1, "'completions'"),
    "texts, later messages": ([GOOD, {"prompt": chat("u:a"), "completion": chat("a:b")}], 2, "'prompt'"),
    "completions as text": ([{"prompt": "a", "completions": "b"}], 1, "'completions'"),
    "no completions": ([{"prompt": "a", "completions": []}], 1, "'completions'"),
    "no content and no tool call": ([{"messages": [{"role": "assistant", "content": None}]}], 1, "'content'"),
    "tools that are no list": ([CHAT, {**CHAT, "tools": {"name": "a"}}], 2, "'tools' must be a list"),
    "tools that are no JSON": ([CHAT, {**CHAT, "tools": "[{"}], 2, "'tools' is not JSON"),
    "a lone surrogate": (
        [CHAT, {"messages": chat("u:a", "a:b\ud800")}],
        2,
        r"'messages' has a lone surrogate .'\\ud800'",
    ),
    "a lone surrogate in a tool": ([{**CHAT, "tools": r'[{"name": "\udc00"}]'}], 1, "'tools' has a lone surrogate"),
    "a lone surrogate in a text": (
        [GOOD, {"prompt": "a\udfff", "completion": "b"}],
        2,
        "'prompt' has a lone surrogate",
    ),
    "half a weight": (
        [CHAT, {"messages": [{**CHAT["messages"][1], "weight": 0.5}]}],
        2,
        "'weight' is 0.5; give 0 or 1",
    ),
    "weight as text": ([{"messages": [{**CHAT["messages"][1], "weight": "0"}]}], 1, "'weight' is '0'; give 0 or 1"),
    "weight of a row": ([CHAT, {**CHAT, "weight": 0}], 2, "the row's 'weight' is 0 and would not be read"),
    "weight by another name": (
        [{"messages": [{**CHAT["messages"][1], "loss": False}]}],
        1,
        "a message with 'loss': False, which would not be read; write 'weight': 0",
    ),
    "weight of a user": ([{"messages": [{**CHAT["messages"][0], "weight": 1}]}], 1, "role 'user' and weight 1"),
    "options as a list": ([{**CHAT, "chat_template_kwargs": [1]}], 1, "'chat_template_kwargs' must be an object"),
    "an empty one of several": ([{"prompt": "a", "completions": ["b", ""]}], 1, "'completions' is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_by_file_line_and_field(case: str, tmp_path: Path) -> None:
    rows, line, what = BAD[case]
    source = write(tmp_path / "data.jsonl", *rows)
    with pytest.raises(DataError, match=what) as caught:
        data.read(source)
    assert str(caught.value).startswith(f"{source}:{line}")


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=f"{path}:2 .*UTF-8"):
        data.read(str(path))


@pytest.mark.parametrize("value", ["1" * 5_000, "[" * 50_000 + "]" * 50_000])
def test_a_row_beyond_pythons_limits_is_named(tmp_path: Path, value: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f'{json.dumps(GOOD)}\n{{"prompt": "a", "completion": "b", "more": {value}}}\n')
    with pytest.raises(DataError, match=f"{path}:2 cannot be read .*; leave it out"):
        data.read(str(path))


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "\xc3\xa4"}\n')
    assert [row["text"] for row in data.read(str(path))] == ["ä"]


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("none.jsonl", "No data file .*none.jsonl"),
        (".", "No data file"),
        ("empty.jsonl", "empty.jsonl has no rows"),
        ("blank.jsonl", "blank.jsonl has no rows"),
        ("owner/nothing", "'owner/nothing' is not a local file .* Hub"),
        ("owner/nothing:test", "'owner/nothing:test' is not a local file .* Hub"),
    ],
)
def test_a_bad_source_is_named(source: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    Path("blank.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match=what) as caught:
        data.read(source)
    assert "\n" not in str(caught.value)


def test_a_hub_data_set_is_read_and_named_by_index(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def hub(name: str, split: str) -> Dataset:
        asked.append((name, split))
        return Dataset.from_list([{**GOOD, "extra": 1}, {**GOOD, "prompt": "", "extra": 2}][: len(asked)])

    monkeypatch.setattr(data, "load_dataset", hub)
    rows = data.read("owner/name")
    assert (rows[0], asked) == ({**GOOD, data.LINE: 0}, [("owner/name", "train")])
    with pytest.raises(DataError, match="owner/name:test:1: field 'prompt'"):
        data.read("owner/name:test")
    assert asked[1] == ("owner/name", "test")


# ---------------------------------------------------------------------------------------- from rows to tokens


def test_options_of_a_row_reach_its_chat_template(tmp_path: Path) -> None:
    """TRL's column ``chat_template_kwargs``."""
    tokenizer = tiny_tokenizer("{{ mood }}" + CHATML)
    rows = [{**CHAT, "chat_template_kwargs": {"mood": mood}} for mood in ("x", "yy")]
    for given in (data.read(write(tmp_path / "d.jsonl", *rows)), data.rows_of(Dataset.from_list(rows))):
        kept, _ = data.token_rows(given, tokenizer, None)
        assert [pieces(row, tokenizer)[0][0] for row in kept] == ["x" + header("u:a"), "yy" + header("u:a")]


@pytest.mark.parametrize("row", [CHAT, GOOD, {"text": "ab"}])
@pytest.mark.parametrize("ends", [True, False])
def test_answers_without_an_end_token_are_said_once(row: Row, ends: bool, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer(CHATML if ends else CHATML.replace("<|im_end|>", ""))
    tokenizer.eos_token = tokenizer.eos_token if ends else None
    data.token_rows([row, row], tokenizer, 21, "some.jsonl", [tokenizer.convert_tokens_to_ids(END)])  # where it is cut
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (0 if ends else 1)
    assert all("some.jsonl end in no special token" in text and "eos_token" in text for text in said)


@pytest.mark.parametrize("row", [CHAT, GOOD, {"text": "ab"}])
@pytest.mark.parametrize(
    ("stops", "known"), [([], "no token"), (["b"], "'b'"), (["b", "a"], "'b' and 'a'"), ([END], "")]
)
def test_an_end_token_at_which_generation_goes_on_is_said_once(
    row: Row, stops: list[str], known: str, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Qwen2.5's base models have ChatML in their tokenizer, and stop at another token alone."""
    data.token_rows([row, row], tokenizer, None, "some.jsonl", tokenizer.convert_tokens_to_ids(stops))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (1 if known else 0)
    assert all(f"some.jsonl end in {END!r} and the base model's generation stops at {known}" in text for text in said)
    assert all(f"add {tokenizer.convert_tokens_to_ids(END)} to eos_token_id" in text for text in said)


def test_an_end_token_need_not_be_special(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer(CHATML.replace(END, "~"))
    tokenizer.eos_token = None
    data.token_rows([CHAT], tokenizer, None, "some.jsonl", tokenizer.convert_tokens_to_ids(["~"]))
    assert not caplog.records


@pytest.mark.parametrize("extra", [{"content": None}, {}, {"content": ""}])
def test_content_that_is_left_out_beside_tool_calls_is_empty_text(extra: Row, tmp_path: Path) -> None:
    """From a file, from a data set and in a context; a template may add to it without asking."""
    tokenizer = tiny_tokenizer(
        CHATML.replace("m['content'] +", "m['content'] + (m.tool_calls | tojson if m.tool_calls else '') +")
    )
    answer = {**calling({"x": 1}), **extra}
    row = {"messages": [*chat("u:a"), answer]}
    context = Specialists(tiny(), tokenizer).context().append(row["messages"])
    for given in (data.read(write(tmp_path / "d.jsonl", row)), data.rows_of(Dataset.from_list([row]))):
        kept, _ = data.token_rows(given, tokenizer, None)
        assert pieces(kept[0], tokenizer) == [(header("u:a"), False), (json.dumps(answer["tool_calls"]) + END, True)]
        assert context.token_ids == [*kept[0]["input_ids"], tokenizer.convert_tokens_to_ids("\n")]
    assert context.messages[1] == {**answer, "content": ""}


def test_examples_without_loss_are_left_out_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [CHAT, {"messages": chat("u:never answered")}, {"messages": chat("u:" + "long" * 99, "a:b")}, CHAT]
    kept, left_out = data.token_rows(data.read(write(tmp_path / "d.jsonl", *rows)), tokenizer, 60)
    assert (kept[data.LINE], left_out) == ([1, 4], 2)
    assert [pieces(row, tokenizer)[-1] for row in kept] == [("b" + END, True)] * 2


def test_data_without_any_loss_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    source = write(tmp_path / "d.jsonl", CHAT)
    with pytest.raises(DataError, match=r"No example of .*d.jsonl carries loss.* 5 tokens"):
        data.token_rows(data.read(source), tokenizer, 5, source)


def test_without_a_limit_none_is_named(tokenizer: Any) -> None:
    rows = [{"messages": [{**message, "weight": 0} for message in CHAT["messages"]]}]
    with pytest.raises(DataError, match=r"assistant message or completion; check roles and weights\.$"):
        data.token_rows(rows, tokenizer, None)


@pytest.mark.parametrize("calls", [{"function": {"name": "f"}}, ["f"], "f", [None]])
def test_calls_that_are_none_are_refused_in_rows_and_contexts(calls: Any, tmp_path: Path, tokenizer: Any) -> None:
    messages = [*chat("u:a"), {"role": "assistant", "content": "", "tool_calls": calls}]
    with pytest.raises(DataError, match=r"d\.jsonl:1: 'tool_calls' of a message must be a list of objects, not"):
        data.token_rows(data.read(write(tmp_path / "d.jsonl", {"messages": messages})), tokenizer, None, "d.jsonl")
    with pytest.raises(InputError, match="'tool_calls' of a message must be a list of objects"):
        Specialists(tiny(), tokenizer).context().append(messages)


def calling(arguments: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
    }


@pytest.mark.parametrize(
    ("template", "row", "what"),
    [
        (STRIPPING, {"messages": chat("u:a", "a:<think>b</think>c", "u:d", "a:e")}, "message 1 differently.*a turn"),
        (None, CHAT, "no chat template"),
        ("{{ raise_exception('Only one user message!') }}", CHAT, "Only one user message!"),
        (
            CHATML,
            {"messages": [*chat("u:a"), calling("{")]},
            r"tool call are not JSON \(.*column 2\): '{'",
        ),
        (
            CHATML,
            {"messages": [*chat("u:a"), calling("[1]")]},
            r"tool call must be an object, not \[1\]",
        ),
    ],
    ids=["rewrites", "none", "raises", "arguments", "arguments that are no object"],
)
def test_what_the_template_cannot_do_is_said_of_the_line(
    template: str | None, row: Row, what: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "d.jsonl", "", row)
    with pytest.raises(DataError, match=what) as caught:
        data.token_rows(data.read(source), tiny_tokenizer(template), None, source)
    assert str(caught.value).startswith(f"{source}:2")


def test_the_remedy_for_a_rewriting_template_works(tokenizer: Any) -> None:
    tokenizer = tiny_tokenizer(STRIPPING)
    row = {"prompt": chat("u:a", "a:<think>b</think>c", "u:d"), "completion": chat("a:<think>e</think>f")}
    (before, _), (answer, _) = pieces(data.tokenize(row, Codec(tokenizer), None), tokenizer)
    assert (before, answer) == (header("u:a", "a:c", "u:d"), "<think>e</think>f" + END)


def test_a_key_that_only_some_messages_have_is_not_given_to_the_others(tmp_path: Path) -> None:
    """Arrow fills such keys with None, and templates ask for ``'tool_calls' in message``."""
    tokenizer = tiny_tokenizer(CHATML.replace("m['content'] +", "m['content'] + ('!' if 'name' in m else '') +"))
    named = {"messages": [{"role": "user", "content": "a", "name": "x"}, *chat("a:b")]}
    read = data.read(write(tmp_path / "d.jsonl", named, CHAT))
    for rows in (read, data.rows_of(Dataset.from_list([named, CHAT]))):
        kept, _ = data.token_rows(rows, tokenizer, None)
        assert [pieces(row, tokenizer)[0][0] for row in kept] == [header("u:a!"), header("u:a")]


CALLING = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' "
    "+ (m.content or '') }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_tools_and_tool_calls_reach_the_template_as_they_were_written(tmp_path: Path) -> None:
    """Keys of one tool are not given to another, null stays null, and types may differ from row to row."""
    tokenizer = tiny_tokenizer(CALLING)

    def asking(tool: Any, arguments: Any) -> tuple[list[Any], list[Any], list[tuple[str, bool]]]:
        call = [{"name": "f", "arguments": arguments}]
        messages = [*chat("u:a"), {"role": "assistant", "content": None, "tool_calls": call}]
        prompt = json.dumps(tool) + "\n" + header("u:a")
        return [tool], messages, [(prompt, False), (json.dumps(call) + END, True)]

    one = asking({"name": "f", "parameters": {"x": {"type": "int"}}}, {"x": 1})
    other = asking({"name": "g", "parameters": {"y": [None, 2]}}, {"x": "1", "y": None})
    rows: list[Row] = [
        {"messages": one[1], "tools": one[0]},
        {"messages": other[1], "tools": json.dumps(other[0])},
    ]
    kept, _ = data.token_rows(data.read(write(tmp_path / "d.jsonl", *rows)), tokenizer, None)
    assert [pieces(row, tokenizer) for row in kept] == [one[2], other[2]]
    for form, answers in (("completion", other[1][1:]), ("completions", [other[1][1:]])):
        row = {"prompt": other[1][:1], form: answers, "tools": other[0]}
        assert pieces(data.tokenize(row, Codec(tokenizer), None), tokenizer) == other[2]
        assert all(part["tools"] == other[0] for part in data.separate(row))


@pytest.mark.parametrize("case", ["missing field", "empty text", "texts, later messages"])
def test_a_bad_row_of_a_data_set_in_memory_is_named_by_its_index(case: str) -> None:
    rows, line, what = BAD[case]
    if case.startswith("texts"):  # which Arrow cannot hold in one column
        rows = [{"text": "a"}, {"prompt": "a", "completion": "b"}]
        what = "'text' is missing"
    with pytest.raises(DataError, match=f"^the data set:{line - 1}: .*{what}"):
        list(data.rows_of(Dataset.from_list(rows)))


def test_separate_gives_each_completion_its_row() -> None:
    assert data.separate(GOOD) == [GOOD]
    parts = data.separate({"prompt": "a", "completions": ["b", "c"], data.LINE: 3})
    assert parts == [{"prompt": "a", "completion": text, data.LINE: 3} for text in "bc"]
