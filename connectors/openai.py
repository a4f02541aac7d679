"""OpenAI batch files as rows: one row for every choice that a line asks for.

A line is ``{"custom_id": …, "method": "POST", "url": …, "body": {…}}``. It becomes as many rows as its
response has choices (``n`` for each of its prompts), which follow each other, so that every row is one
answer. A line that can't be answered at all is one bad row.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batchinfer.connectors.batches import Record
from batchinfer.connectors.types import BadRow

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

_URLS = {CHAT: CHAT, COMPLETIONS: COMPLETIONS, CHAT[3:]: CHAT, COMPLETIONS[3:]: COMPLETIONS}
_BOM = b"\xef\xbb\xbf"
MOST_SAMPLES, MOST_PROMPTS = 128, 2048

COLUMNS = pa.schema(
    [
        pa.field("custom_id", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("prompt_index", pa.int32(), nullable=False),
        pa.field("choice_index", pa.int32(), nullable=False),
        pa.field("choices", pa.int32(), nullable=False),
        pa.field("body", pa.string(), nullable=False),
    ]
)
"""The columns of every batch file. ``url`` is CHAT or COMPLETIONS, ``choices`` how many choices the
response has, ``choice_index`` and ``prompt_index`` which choice, and which of the line's prompts, the row
is. ``body`` is JSON."""

LOGPROBS = pa.field("logprobs", pa.int32())
"""A further column where any line asks for log-probabilities: of how many tokens beside the sampled one;
null where the line asks for none."""


class BadRequest(Exception):
    """A request that can't be answered: one sentence."""


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A request line: ``prompts`` is how many prompts its body holds, ``n`` the answers to each, and
    ``logprobs`` how many tokens beside each sampled one get log-probabilities (None: no token does)."""

    custom_id: str
    url: str
    body: str
    prompts: int
    n: int
    logprobs: int | None

    @property
    def choices(self) -> int:
        """Choices of the response: rows of the line."""
        return self.prompts * self.n

    def values(self, choice: int, schema: pa.Schema) -> list[Any]:
        """The row of one choice, by the columns of ``schema``."""
        row = {
            "custom_id": self.custom_id,
            "url": self.url,
            "prompt_index": choice // self.n,
            "choice_index": choice,
            "choices": self.choices,
            "body": self.body,
            "logprobs": self.logprobs,
        }
        return [row[name] for name in schema.names]


def parse_line(line: bytes) -> BatchLine:
    """A request line. Raises BadRequest where it does not have the form of one."""
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError:
        raise BadRequest("the line is not valid UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the line is not JSON ({error})") from None
    if type(value) is not dict:
        raise BadRequest("the line is JSON, but no object")
    custom_id, body = custom_id_of(value), value.get("body")
    if custom_id is None:
        raise BadRequest("custom_id must be a string, by which the answer is found again")
    method, url = value.get("method"), value.get("url")
    if method not in (None, "POST"):
        raise BadRequest(f"method is {shortened(method)}, but it must be POST")
    if not isinstance(url, str) or url not in _URLS:
        raise BadRequest(f"url is {shortened(url)}, but only {CHAT} and {COMPLETIONS} are served")
    if type(body) is not dict:
        raise BadRequest(f"body is {shortened(body)}, but it must be an object")
    text = json.dumps(body, ensure_ascii=False)
    if not _is_unicode(text):
        raise BadRequest("body holds text that is not valid Unicode")
    n = body.get("n")
    n = 1 if n is None else whole_number("n", n, 1, MOST_SAMPLES)
    kind = _URLS[url]
    prompts = 1 if kind == CHAT else len(prompts_of(body))
    return BatchLine(custom_id, kind, text, prompts, n, _logprobs(kind, body))


def custom_id_of(value: Any) -> str | None:
    """The custom_id of a parsed line, which may be wrong otherwise; numbers are taken as text."""
    found = value.get("custom_id") if isinstance(value, dict) else None
    if type(found) is int:
        return str(found)
    return found if isinstance(found, str) and _is_unicode(found) else None


def prompts_of(body: dict[str, Any]) -> list[str | tuple[int, ...]]:
    """The prompts of a completions body: a text, token ids, or a list of either. Raises BadRequest."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise BadRequest(
            f"prompt is {shortened(prompt)}, but it must be a text, token ids, or a list of either"
        )
    if _are_tokens(prompt):
        return [tuple(prompt)]
    if len(prompt) > MOST_PROMPTS:
        raise BadRequest(f"prompt holds {len(prompt)} prompts, but it may hold {MOST_PROMPTS} at most")
    found: list[str | tuple[int, ...]] = []
    for number, item in enumerate(prompt):
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, list) and item and _are_tokens(item):
            found.append(tuple(item))
        else:
            raise BadRequest(f"prompt[{number}] is {shortened(item)}, but it must be a text or token ids")
    return found


def whole_number(name: str, value: Any, least: int, most: int) -> int:
    """``value``, if it is a whole number in this range; raises BadRequest naming the field otherwise."""
    if type(value) is not int or not least <= value <= most:
        raise BadRequest(
            f"{name} is {shortened(value)}, but it must be a whole number from {least} to {most}"
        )
    return value


def _are_tokens(values: list[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _logprobs(url: str, body: dict[str, Any]) -> int | None:
    wanted, top = body.get("logprobs"), body.get("top_logprobs")
    if url == COMPLETIONS:
        return None if wanted is None else whole_number("logprobs", wanted, 0, 20)
    if wanted is not None and not isinstance(wanted, bool):
        raise BadRequest(f"logprobs is {shortened(wanted)}, but it must be true or false")
    if not wanted:
        if top:
            raise BadRequest(f"top_logprobs is {shortened(top)}, which needs logprobs to be true")
        return None
    return 0 if top is None else whole_number("top_logprobs", top, 0, 20)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shortened(value: Any) -> str:
    """A JSON value for people."""
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode()
    return text if len(text) <= 60 else text[:57] + "..."


def _numbered(blocks: Iterable[bytes], first_line: int) -> Iterator[tuple[int, int, bytes]]:
    """(offset in the blocks, line number, line) of every line that is not blank."""
    offset, number = 0, first_line - 1
    for block in blocks:
        lines = block.split(b"\n")
        if not lines[-1]:
            lines.pop()
        for line in lines:
            number += 1
            start, offset = offset, offset + len(line) + 1
            if number == 1:
                line = line.removeprefix(_BOM)
            if line and not line.isspace():
                yield start, number, line


class LineScan:
    """Where a file's rows are, from one pass over its lines.

    ``offsets``, ``lines`` and ``firsts`` are marks at which the file may be cut: byte, line number and
    number of rows before. Between two of them are at most ``granule`` rows, or one line.
    """

    def __init__(self, blocks: Iterable[bytes], granule: int) -> None:
        """Read all lines."""
        self.rows = 0
        self.logprobs = False
        self.offsets, self.lines, self.firsts = array("q"), array("q"), array("q")
        for offset, number, line in _numbered(blocks, 1):
            try:
                parsed = parse_line(line)
            except BadRequest:
                choices = 1
            else:
                choices = parsed.choices
                self.logprobs = self.logprobs or parsed.logprobs is not None
            if not self.firsts or self.rows + choices - self.firsts[-1] > granule:
                self.offsets.append(offset)
                self.lines.append(number)
                self.firsts.append(self.rows)
            self.rows += choices


def schema(logprobs: bool) -> pa.Schema:
    """The columns of batch files; ``logprobs``: whether any line asks for them."""
    return COLUMNS.append(LOGPROBS) if logprobs else COLUMNS


def records(
    blocks: Iterable[bytes], schema: pa.Schema, uri: str, first_line: int, first_row: int, skip: int
) -> Iterator[Record | BadRow]:
    """The rows of blocks that begin at line ``first_line``, less the first ``skip`` rows.

    ``first_row`` is the position of the first row given out.
    """
    index = first_row - skip
    for _, number, line in _numbered(blocks, first_line):
        place = f"{uri}, line {number}"
        raw = line.decode("utf-8", "replace").rstrip("\r")
        try:
            parsed = parse_line(line)
        except BadRequest as error:
            if index >= first_row:
                yield BadRow(index, "bad_request", f"{place}: {error}", raw)
            index += 1
            continue
        for choice in range(parsed.choices):
            if index >= first_row:
                yield Record(parsed.values(choice, schema), raw, place)
            index += 1
