"""Prompts: one input row becomes the text or the chat messages that the model gets."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
from jinja2 import TemplateError, TemplateSyntaxError

from batchinfer.connectors.openai import LOGPROBS
from batchinfer.engine.types import Message, SamplingParams
from batchinfer.jobs.batch_requests import read_request
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.template import Template, compile_template
from batchinfer.jobs.types import JobError, RowError

Prompt = str | tuple[int, ...] | tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Prompts:
    """How a job makes its prompts: ``columns`` are those it reads, ``render`` makes one row's prompt.

    ``render`` raises RowError with the code ``render_error``. Where rows say themselves how they are
    sampled, ``sampling`` tells it from a row's values. In batch files both raise RowError with the code
    ``bad_request``.
    """

    columns: tuple[str, ...]
    render: Callable[[Mapping[str, Any]], Prompt]
    sampling: Callable[[Mapping[str, Any]], SamplingParams] | None = None


def compile_prompts(spec: JobSpec, schema: pa.Schema) -> Prompts:
    """The prompts of a job over rows of this schema; templates are compiled once.

    Raises JobError for a template that is wrong, and for a column that is not there or of the wrong type,
    naming the columns there are.
    """
    if spec.input.format == "openai":
        tokens = spec.output.tokens
        return Prompts(
            tuple(schema.names),
            lambda values: read_request(values, tokens)[0],
            lambda values: read_request(values, tokens)[1],
        )
    if spec.prompt is not None:
        template = _template("prompt", spec.prompt, schema)
        return Prompts(template.columns, template.render)
    if spec.messages is not None:
        parts = [
            (message.role, _template(f"messages[{number}].content", message.content, schema))
            for number, message in enumerate(spec.messages)
        ]

        def render(values: Mapping[str, Any]) -> Prompt:
            return tuple({"role": role, "content": part.render(values)} for role, part in parts)

        return Prompts(tuple(dict.fromkeys(name for _, part in parts for name in part.columns)), render)
    if spec.prompt_column is not None:
        name = _column("prompt_column", spec.prompt_column, schema, _is_text, "text or a plain value")
        return Prompts((name,), lambda values: _text(name, values))
    assert spec.messages_column is not None
    name = _column(
        "messages_column",
        spec.messages_column,
        schema,
        _is_messages,
        "a list of structs with role and content, or the same as a JSON string",
    )
    return Prompts((name,), lambda values: _messages(name, values.get(name)))


def widest_sampling(spec: JobSpec, schema: pa.Schema) -> tuple[SamplingParams, bool]:
    """What the output must have columns for, and whether it has those of single tokens.

    That is the job's sampling and ``output.tokens``; of batch files, whose rows differ, what any asks for.
    """
    sampling = spec.sampling_params()
    if spec.input.format == "openai" and LOGPROBS.name in schema.names:
        return replace(sampling, logprobs=1), True
    return sampling, spec.output.tokens


def _template(where: str, source: str, schema: pa.Schema) -> Template:
    try:
        template = compile_template(where, source, schema.names)
    except TemplateSyntaxError as error:
        raise JobError(f"{where}, line {error.lineno}, is not a valid template: {error.message}") from None
    except TemplateError as error:
        raise JobError(f"{where} is not a valid template: {error.message}") from None
    missing = [name for name in template.columns if name not in schema.names]
    if missing:
        raise JobError(
            f"the template in {where} names the column {missing[0]}, but the input has no such column: "
            f"its columns are {_names(schema)}"
        )
    return template


def _column(
    where: str, name: str, schema: pa.Schema, fits: Callable[[pa.DataType], bool], rule: str
) -> str:
    if name not in schema.names:
        raise JobError(
            f"{where} is {name}, but the input has no such column: its columns are {_names(schema)}"
        )
    kind = schema.field(name).type
    if not fits(kind):
        raise JobError(f"{where} is {name}, whose type is {kind}, but it must be {rule}")
    return name


def _names(schema: pa.Schema) -> str:
    return ", ".join(schema.names) or "none"


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return not (pa.types.is_nested(kind) or pa.types.is_null(kind) or _is_binary(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _is_messages(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
        return bool(
            pa.types.is_struct(kind) and {"role", "content"} <= {field.name for field in kind.fields}
        )
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _text(name: str, values: Mapping[str, Any]) -> str:
    value = values.get(name)
    if value is None:
        raise RowError("render_error", f"the column {name} is null on this row, so there is no prompt")
    return value if isinstance(value, str) else str(value)


def _messages(name: str, value: Any) -> tuple[Message, ...]:
    def refuse(problem: str) -> RowError:
        return RowError("render_error", f"the column {name} {problem} on this row")

    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise refuse(f"is not valid JSON ({error})") from None
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise refuse("holds no list of messages")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise refuse(f"has a message {number} that is no object")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise refuse(f"has a message {number} whose {key} is no text")
        messages.append({key: inner for key, inner in message.items() if inner is not None})
    return tuple(messages)
