"""Training data: JSON lines or a Hub data set -> token rows that say which token carries loss.

Forms of a row (TRL's names):

    {"messages": [...]}                            loss on every assistant message
    {"prompt": ..., "completion": ...}             loss on the completion; texts or message lists
    {"prompt": ..., "completions": [..., ...]}     several completions that share their prompt's encoder pass
    {"text": ...}                                  loss on every token

A text is tokenized in pieces, cut where loss begins and ends. That is how a ``Context`` appends and generates, so
training and inference see the same tokens.

Chats may have ``"tools"`` (a list, or its JSON text) and ``"chat_template_kwargs"`` (an object) for the chat template,
and ``"weight": 0`` on assistant messages that are to carry no loss. Rows stay as they were read until they are tokens:
in an Arrow table each message, tool and argument would get the keys of all others.
"""

from __future__ import annotations

import gzip
import json
import logging
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from icarus.chat_template import Codec, surrogates
from icarus.errors import DataError, InputError, first_line
from icarus.streams import IGNORED
from icarus.train.answers import Answer, Chat, rendered

logger = logging.getLogger(__name__)

LINE = "line"
"""Column with a row's line in its file (or index in its data set), kept for messages."""

_FORMS = (("messages",), ("prompt", "completion"), ("prompt", "completions"), ("text",))
_BESIDE_A_CHAT = ("tools", "chat_template_kwargs")
_WEIGHTS_ELSEWHERE = ("loss", "train", "training")  # ms-swift's and axolotl's names for a message's weight


def read(source: str) -> list[dict[str, Any]]:
    """Rows of a local JSON-lines file or of a Hub data set (``owner/name`` or ``owner/name:split``), checked.

    Raises:
        DataError: naming file, line and field.
    """
    rows = list(_checked(objects(source), source))
    if not rows:
        raise DataError(f"{source} has no rows; give at least one example.")
    return rows


def objects(source: str) -> Iterator[dict[str, Any]]:
    """The rows as they are, each with its ``LINE``; a file may be packed with gzip.

    Raises:
        DataError: there is no such file or data set, or a line is no JSON object.
    """
    path = Path(source).expanduser()
    local = path.suffix in {".jsonl", ".json", ".gz"} or path.exists()
    return _lines(path) if local else _hub_rows(source)


def rows_of(dataset: Dataset, source: str = "the data set") -> Iterator[dict[str, Any]]:
    """Rows of a data set in memory, checked, without the keys that Arrow filled with None.

    Raises:
        DataError: naming the row's index and the field.
    """
    yield from _checked(({LINE: index, **_without_none(row)} for index, row in enumerate(dataset)), source)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _checked(rows: Iterable[dict[str, Any]], source: str) -> Iterator[dict[str, Any]]:
    """The rows with what is read of them; all must have the form of the first."""
    form: tuple[str, ...] = ()
    texts = False
    for row in rows:
        if not form:
            form = _form(row, source)
            texts = isinstance(row[form[0]], str)
        check(row, form, f"{source}:{row[LINE]}")
        if isinstance(row[form[0]], str) != texts:
            raise DataError(
                f"{source}:{row[LINE]}: field {form[0]!r} must be a text or a list of messages, in every row alike."
            )
        yield {name: row[name] for name in (*form, *_BESIDE_A_CHAT, LINE) if name in row}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in _numbered(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip())
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number} is not UTF-8 ({error.reason} at byte {error.start + 1}).") from error
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number} is not JSON ({error.msg} at column {error.colno}).") from error
        except (ValueError, RecursionError) as error:  # Python's own limits
            raise DataError(f"{path}:{number} cannot be read ({first_line(error)}); leave it out.") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number} is a {type(row).__name__}; each line must be a JSON object.")
        yield {**row, LINE: number}


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    if not path.is_file():
        raise DataError(f"No data file {path}; give a .jsonl file or a Hub data set as owner/name.")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from enumerate(file, 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({first_line(error)}); copy it again.") from error


def _hub_rows(source: str) -> Iterator[dict[str, Any]]:
    name, _, split = source.partition(":")
    try:
        dataset = load_dataset(name, split=split or "train")
    except Exception as error:  # offline, missing, gated: many exceptions with one meaning
        raise DataError(
            f"Data set {source!r} is not a local file and could not be loaded from the Hub ({first_line(error)}); "
            "check its name and the connection."
        ) from error
    yield from ({**_without_none(row), LINE: index} for index, row in enumerate(dataset))


def form(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What the form of a checked row is told by: its fields, and the types that these have."""
    fields = _form(row, "")
    return (*fields, *(type(row[name]).__name__ for name in fields))


def _form(row: Mapping[str, Any], source: str) -> tuple[str, ...]:
    for form in _FORMS:
        if all(name in row for name in form):
            return form
    fields = ", ".join(sorted(set(row) - {LINE})) or "nothing"
    raise DataError(
        f"{source}:{row[LINE]} has {fields}; a row needs 'messages', 'prompt' and 'completion', "
        "'prompt' and 'completions', or 'text'."
    )


def check(row: Mapping[str, Any], form: Sequence[str], where: str) -> None:
    """Refuse a row that lacks one of the fields of ``form``, or has something else there.

    Raises:
        DataError: naming ``where`` and the field.
    """
    for name in form:
        if name not in row:
            raise DataError(f"{where}: field {name!r} is missing; every row must have the form of the first.")
        value = row[name]
        if name == "completions":
            if not isinstance(value, list) or not value:
                raise DataError(f"{where}: field 'completions' must be a list of one or more completions.")
            for completion in value:
                _check_text(completion, name, where)
        elif name == "messages" and isinstance(value, str):
            raise DataError(f"{where}: field 'messages' must be a list of messages, not a text.")
        else:
            _check_text(value, name, where)
    if "prompt" in form:
        answers = row["completions"] if "completions" in form else [row["completion"]]
        if any(isinstance(answer, str) != isinstance(row["prompt"], str) for answer in answers):
            raise DataError(f"{where}: 'prompt' and '{form[1]}' must both be texts or both be lists of messages.")
    _tools(row, f"{where}: ")
    if row.get("weight", 1) not in (1, None):
        raise DataError(
            f"{where}: the row's 'weight' is {row['weight']!r:.20} and would not be read; give messages a 'weight' of "
            "0 or 1, or leave the row out."
        )
    if not isinstance(row.get("chat_template_kwargs") or {}, dict):
        raise DataError(f"{where}: field 'chat_template_kwargs' must be an object.")
    for name in (*form, *_BESIDE_A_CHAT):
        if lone := next(surrogates(_tools(row) if name == "tools" else row.get(name)), None):
            raise DataError(f"{where}: field {name!r} has a lone surrogate ({lone!a}), which is not text; remove it.")


def _check_text(value: Any, name: str, where: str) -> None:
    if isinstance(value, str):
        if not value:
            raise DataError(f"{where}: field {name!r} is empty.")
        return
    if name == "text" or not isinstance(value, list) or not value:
        raise DataError(f"{where}: field {name!r} must be a text or a non-empty list of messages.")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: field {name!r} has a message without a 'role': {message!r:.80}.")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise DataError(f"{where}: field {name!r} has a message whose 'content' is not text: {message!r:.80}.")
        _check_weight(message, name, where)


def _check_weight(message: Mapping[str, Any], name: str, where: str) -> None:
    if other := next((key for key in _WEIGHTS_ELSEWHERE if message.get(key) in (0, False)), None):
        raise DataError(
            f"{where}: field {name!r} has a message with {other!r}: {message[other]!r}, which would not be read; write "
            "'weight': 0 instead."
        )
    weight = message.get("weight")
    if weight is not None and weight not in (0, 1):
        raise DataError(f"{where}: field {name!r} has a message whose 'weight' is {weight!r}; give 0 or 1.")
    if weight and message["role"] != "assistant":
        raise DataError(
            f"{where}: field {name!r} has a message of role {message['role']!r} and weight 1, and only what the "
            "assistant says carries loss; leave out 'weight'."
        )


# ------------------------------------------------------------------------------------------ tokens


@dataclass
class _Row:
    """Token columns of one example under construction."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    branch_ids: list[int] = field(default_factory=list)

    def add(self, tokens: Sequence[int], *, loss: bool, branch: int = 0, trunk: int | None = None) -> None:
        """Append tokens; ``trunk`` starts a branch behind that many shared tokens."""
        start = trunk if trunk is not None else self.position_ids[-1] + 1 if self.position_ids else 0
        self.input_ids.extend(tokens)
        self.labels.extend(tokens if loss else [IGNORED] * len(tokens))
        self.position_ids.extend(range(start, start + len(tokens)))
        self.branch_ids.extend([branch] * len(tokens))

    def columns(self, max_length: int | None) -> dict[str, list[int]]:
        keep = [i for i, p in enumerate(self.position_ids) if max_length is None or p < max_length]
        return {name: [values[i] for i in keep] for name, values in vars(self).items()}


def tokenize(row: Mapping[str, Any], codec: Codec, max_length: int | None) -> dict[str, Any]:
    """Columns ``input_ids, labels, position_ids, branch_ids`` of one checked row; no position from max_length on."""
    out = _Row()
    if "completions" in row:
        trunk, branches = _tree(row, codec)
        out.add(trunk, loss=False)
        for number, pieces in enumerate(branches, 1):
            for i, (tokens, loss) in enumerate(piece for piece in pieces if piece[0]):
                out.add(tokens, loss=loss, branch=number, trunk=len(trunk) if i == 0 else None)
    else:
        for tokens, loss in _pieces(row, codec):
            out.add(tokens, loss=loss)
    if out.labels:
        out.labels[0] = IGNORED  # nothing comes before it that could predict it
    return out.columns(max_length)


_Pieces = list[tuple[list[int], bool]]


def _pieces(row: Mapping[str, Any], codec: Codec) -> _Pieces:
    """The row's tokens, cut where loss begins and ends."""
    if "text" in row:
        ids = codec.encode(row["text"], ending=True)
        opening = len(codec.beginning) * (ids[: len(codec.beginning)] == codec.beginning)
        return [(ids[:opening], False), (ids[opening:], True)]
    prompt, completion = row.get("prompt", []), row.get("completion", row.get("messages"))
    if not isinstance(prompt, str):
        options = row.get("chat_template_kwargs") or {}
        messages = [*prompt, *completion]
        return _chat(Chat(messages=messages, first=len(prompt), tools=_tools(row), options=options), codec)
    before = codec.encode(prompt)
    return [(before, False), (codec.encode(completion, after=before, ending=True), True)]


def _chat(chat: Chat, codec: Codec) -> _Pieces:
    whole, answers = rendered(chat, codec)
    pieces: _Pieces = []
    tokens: list[int] = []
    done = 0
    for answer in answers or [Answer(len(whole), len(whole), loss=False)]:
        for text, loss in ((whole[done : answer.start], False), (whole[answer.start : answer.end], answer.loss)):
            pieces.append((codec.encode(text, after=tokens, rendered=True), loss))
            tokens += pieces[-1][0]
        done = answer.end
    return pieces


def _tree(row: Mapping[str, Any], codec: Codec) -> tuple[list[int], list[_Pieces]]:
    """The shared prompt's tokens, and each completion's pieces."""
    trunk: list[int] = []
    branches: list[_Pieces] = []
    for completion in row["completions"]:
        pieces = _pieces({**row, "completion": completion}, codec)
        if branches and pieces[0][0] != trunk:
            raise DataError("the messages before the first answer differ between 'completions'; give one row each.")
        trunk = pieces[0][0]
        branches.append(pieces[1:])
    return trunk, branches


def _tools(row: Mapping[str, Any], where: str = "") -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}field 'tools' is not JSON ({error.msg} at column {error.colno}).") from error
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{where}field 'tools' must be a list of tools, or its JSON text.")
    return tools or None


def separate(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row with several completions as rows with one each (what a conventional trainer takes)."""
    if "completions" not in row:
        return [dict(row)]
    shared = {name: value for name, value in row.items() if name != "completions"}
    return [{**shared, "completion": completion} for completion in row["completions"]]


def _warn_about_end(row: Mapping[str, Any], codec: Codec, ends: Sequence[int], source: str) -> None:
    """Told by the first row: the tokenizer and the template are the same for all."""
    last = [label for label in tokenize(row, codec, None)["labels"] if label != IGNORED][-1]
    if last in ends:
        return
    if last not in codec.added:
        logger.warning(
            "Answers of %s end in no special token, so the model will not learn where to stop; let the chat template "
            "write one behind each answer, or give the tokenizer an eos_token.",
            source,
        )
    else:
        name, *known = codec.tokenizer.convert_ids_to_tokens([last, *ends])
        logger.warning(
            "Answers of %s end in %r and the base model's generation stops at %s, so a specialist will go on behind "
            "its answer; add %d to eos_token_id in the base model's generation_config.json, or to stop_token_ids in "
            "requests.",
            source,
            name,
            " and ".join(map(repr, known)) or "no token",
            last,
        )


def token_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    source: str = "the data set",
    ends: Sequence[int] | None = None,
) -> tuple[Dataset, int]:
    """Tokenize checked rows (of ``read`` or ``rows_of``); those without any loss token are left out and counted.

    Warns if answers have no end token, or one at which generation does not stop; ``ends`` are those at which it does,
    None if nobody is to be warned. Returns the token rows and the number of those left out.

    Raises:
        DataError: no example carries loss.
    """
    codec = Codec(tokenizer)
    columns: dict[str, list[Any]] = {}
    left_out = 0
    for row in tqdm(rows, desc="Tokenizing", disable=not sys.stderr.isatty()):
        try:
            tokens = tokenize(row, codec, max_length)
        except InputError as error:
            where = f"{source}:{row[LINE]}" if LINE in row else source
            raise DataError(f"{where}: {error}") from error
        if all(label == IGNORED for label in tokens["labels"]):
            left_out += 1
            continue
        if not columns and ends is not None:
            _warn_about_end(row, codec, ends, source)
        for name, values in tokens.items():  # as arrays: lists of ints would take ten times the memory
            columns.setdefault(name, []).append(np.asarray(values, dtype=np.int32))
        if LINE in row:
            columns.setdefault(LINE, []).append(row[LINE])
    if not columns:
        within, more = (f" within {max_length} tokens", ", or raise max_length") if max_length else ("", "")
        raise DataError(
            f"No example of {source} carries loss: none has an assistant message or completion{within}; check roles "
            f"and weights{more}."
        )
    return Dataset.from_dict(columns), left_out
