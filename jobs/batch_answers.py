"""A job's rows as the lines of an OpenAI batch output file, in the order of its input."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from heapq import merge
from itertools import groupby
from typing import Any

from batchinfer.connectors.openai import CHAT, LOGPROBS, custom_id_of
from batchinfer.connectors.storage import open_store
from batchinfer.jobs.folder import JobFolder
from batchinfer.jobs.inspection import token_decoder
from batchinfer.jobs.job import Job
from batchinfer.jobs.retry import failures_in_order
from batchinfer.jobs.spec import parse_spec
from batchinfer.jobs.types import JobError

_NEEDED = ("custom_id", "url", "prompt_index", "choice_index", "choices")
_TOKENS = ("token_ids", "token_logprobs", "top_logprobs")
_FROM_ROWS = ("completion", "finish_reason", "prompt_tokens", "cached_tokens", "completion_tokens")


@dataclass(frozen=True, slots=True)
class AnswerLine:
    """A line of the output, without its line break; ``failed``: it holds an error."""

    custom_id: str | None
    failed: bool
    text: str


@dataclass(frozen=True, slots=True)
class _Choice:
    """An answered or failed row: ``line`` is the position of its line's first row, ``error`` the code
    and the message of a failure."""

    line: int
    values: Mapping[str, Any]
    error: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class _Author:
    """What the lines of one job say alike: when it was submitted, which model answered, and its tokens."""

    created: int
    model: str
    fingerprint: str
    token_bytes: Callable[[int], bytes]
    ends: frozenset[int]


def answer_lines(job: Job) -> Iterator[AnswerLine]:
    """One line for each line of the input all of whose rows are done, in the order of the input.

    It has a response, or an error where it can't be answered: of its first row that can't. Ids come from
    the custom_id and the line's place, ``created`` is when the job was submitted: the same job gives the
    same lines. Raises JobError where the job was not made of batch files, or leaves out their columns.
    """
    record = job.record
    spec = parse_spec(record.spec)
    if spec.input.format != "openai":
        raise JobError(
            f"the job at {job.uri} has no OpenAI batch file as its input (input.format), so its answers "
            "can't be one: choose table, jsonl or parquet"
        )
    missing = [name for name in record.input_schema.names if name not in (*record.schema.names, "body")]
    if missing:
        raise JobError(
            f"the job at {job.uri} leaves out the column {missing[0]}, which an OpenAI batch file is made "
            "from: submit it to another output.uri with that column in input.columns"
        )
    token_bytes, ends = (
        token_decoder(spec) if LOGPROBS.name in record.schema.names else (lambda _: b"", frozenset[int]())
    )
    created = int(datetime.fromisoformat(record.created).timestamp())
    author = _Author(created, spec.model.source, record.fingerprint, token_bytes, ends)
    folder = JobFolder(open_store(job.uri, spec.storage_options()))
    rows = merge(_answers(job), _failures(folder), key=lambda row: row[0])
    for _, found in groupby((choice for _, choice in rows), key=lambda choice: choice.line):
        choices = list(found)
        failed = next((choice for choice in choices if choice.error is not None), None)
        if failed is not None or len(choices) == choices[0].values["choices"]:
            line = _line(choices, failed, author)
            yield AnswerLine(line["custom_id"], failed is not None, json.dumps(line, ensure_ascii=False))


def _answers(job: Job) -> Iterator[tuple[int, _Choice]]:
    """The answered rows by their position in the whole input."""
    for batch in job.batches():
        wanted = [*_NEEDED, *_FROM_ROWS, LOGPROBS.name, *_TOKENS]
        names = [name for name in wanted if name in batch.schema.names]
        indexes = batch.column("row_index").to_pylist()
        for index, values in zip(indexes, batch.select(names).to_pylist(), strict=True):
            yield index, _Choice(index - values["choice_index"], values)


def _failures(folder: JobFolder) -> Iterator[tuple[int, _Choice]]:
    """The failed rows; one that was not a request carries its line as it was."""
    for failure in failures_in_order(folder):
        try:
            values = json.loads(failure.input or "")
        except ValueError:
            values = {}
        if not isinstance(values, dict) or not isinstance(values.get("body"), str):
            values = {"custom_id": custom_id_of(values), "choice_index": 0}
        index = failure.row_index
        yield index, _Choice(index - values["choice_index"], values, (failure.code, failure.message))


def _line(choices: list[_Choice], failed: _Choice | None, author: _Author) -> dict[str, Any]:
    first = choices[0]
    custom_id = first.values["custom_id"]
    name = hashlib.sha256(f"{first.line} {custom_id}".encode()).hexdigest()[:24]
    line: dict[str, Any] = {"id": f"batch_req_{name}", "custom_id": custom_id}
    if failed is not None and failed.error is not None:
        code, message = failed.error
        return {**line, "response": None, "error": {"code": code, "message": message}}
    rows = [choice.values for choice in choices]
    response = {"status_code": 200, "request_id": f"req_{name}", "body": _body(rows, name, author)}
    return {**line, "response": response, "error": None}


def _body(rows: list[Mapping[str, Any]], name: str, author: _Author) -> dict[str, Any]:
    chat = rows[0]["url"] == CHAT
    # Choices of one prompt share it: it counts once.
    prompts = list({row["prompt_index"]: row for row in reversed(rows)}.values())
    prompt_tokens = sum(row["prompt_tokens"] for row in prompts)
    completion_tokens = sum(row["completion_tokens"] for row in rows)
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
        "object": "chat.completion" if chat else "text_completion",
        "created": author.created,
        "model": author.model,
        "choices": [(_chat_choice if chat else _text_choice)(row, author) for row in rows],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(row["cached_tokens"] for row in prompts)},
        },
        "system_fingerprint": author.fingerprint,
    }


def _chat_choice(row: Mapping[str, Any], author: _Author) -> dict[str, Any]:
    def token(token_id: int, logprob: float) -> dict[str, Any]:
        data = author.token_bytes(token_id)
        return {"token": _text(data), "logprob": logprob, "bytes": list(data)}

    logprobs = None
    if row.get("logprobs") is not None:
        content = [
            {**token(token_id, logprob), "top_logprobs": [token(*pair) for pair in top]}
            for token_id, logprob, top in _tokens(row, author)
        ]
        logprobs = {"content": content, "refusal": None}
    return {
        "index": row["choice_index"],
        "message": {"role": "assistant", "content": row["completion"], "refusal": None},
        "logprobs": logprobs,
        "finish_reason": row["finish_reason"],
    }


def _text_choice(row: Mapping[str, Any], author: _Author) -> dict[str, Any]:
    logprobs = None
    if row.get("logprobs") is not None:
        found = list(_tokens(row, author))
        texts = [_text(author.token_bytes(token_id)) for token_id, _, _ in found]
        offsets = [0]
        for text in texts:
            offsets.append(offsets[-1] + len(text))
        tops = [{_text(author.token_bytes(other)): value for other, value in top} for *_, top in found]
        logprobs = {
            "tokens": texts,
            "token_logprobs": [logprob for _, logprob, _ in found],
            "top_logprobs": tops if row["logprobs"] else None,
            "text_offset": offsets[:-1],
        }
    return {
        "index": row["choice_index"],
        "text": row["completion"],
        "logprobs": logprobs,
        "finish_reason": row["finish_reason"],
    }


def _tokens(
    row: Mapping[str, Any], author: _Author
) -> Iterator[tuple[int, float, list[tuple[int, float]]]]:
    """Each token of an answer, less the one that ended it: its id, its log-probability, the likeliest."""
    ids, logprobs, tops = (row[name] for name in _TOKENS)
    ended = row["finish_reason"] == "stop" and ids and ids[-1] in author.ends
    for token_id, logprob, top in zip(ids[: len(ids) - bool(ended)], logprobs, tops, strict=False):
        yield token_id, logprob, [(entry["token_id"], entry["logprob"]) for entry in top]


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
