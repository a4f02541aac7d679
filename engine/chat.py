"""Chat templates: messages to the text that a model was trained on, rendered as transformers does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from batchinfer.engine.types import Message

# Names under which a message's reasoning is passed; templates read the first.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplateError(ValueError):
    """Messages that a chat template can't render, or a model without a template; one sentence."""


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks what to train on; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own protocol

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Replace the block by its body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template in a sandbox: templates come with models and are not trusted.

    ``special_tokens`` are its variables ``bos_token``, ``eos_token`` and so on. Raises
    ChatTemplateError when ``source`` does not compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"The model's chat template does not compile: {error}.") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The prompt's text. Raises ChatTemplateError where the template refuses the messages."""
        variables: dict[str, Any] = {
            "messages": [_with_reasoning(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render({**self._special_tokens, **variables})
        except Exception as error:  # a template runs arbitrary expressions over the row's values
            raise ChatTemplateError(f"The chat template can't render these messages: {error}") from error


def _with_reasoning(message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ChatTemplateError(f"A message must be an object with role and content, not {message!r}.")
    plain = dict(message)
    reasoning = next((plain[name] for name in _REASONING if plain.get(name) is not None), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
