"""OpenAI request bodies: the prompt of a row and how it is sampled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from batchinfer.connectors.openai import CHAT, BadRequest, prompts_of, shortened, whole_number
from batchinfer.engine.types import Message, SamplingParams
from batchinfer.jobs.types import RowError

# OpenAI's own default for completions; a chat answer may fill the context.
_COMPLETION_TOKENS = 16

# Fields that ask for something else than text, or for another text, with the values that ask for nothing.
# What is named neither here nor below changes no answer (user, metadata, store, ...) and is passed over.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "use_beam_search": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": ([],),
    "guided_grammar": (),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "continue_assistant_turn": (False,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "logits_processors": ([],),
    "length_penalty": (1, 1.0),
    "no_stop_trim": (False,),
    "skip_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "lora_path": (),
}
_NUMBERS = ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_FLAGS = {"ignore_eos": "ignore_eos", "include_stop_str_in_output": "include_stop"}
_INT64 = 2**63

BatchPrompt = str | tuple[int, ...] | tuple[Message, ...]


def read_request(values: Mapping[str, Any], tokens: bool) -> tuple[BatchPrompt, SamplingParams]:
    """The prompt of a row of a batch file, and how it is sampled.

    ``tokens``: with log-probabilities also where the request asks for none. What a request leaves open
    is as OpenAI has it: temperature 1, no limit of a chat answer but the context, 16 tokens of a
    completion. Every choice is a row of its own, so ``n`` is 1 here. Raises RowError with the code
    ``bad_request``, naming the field.
    """
    body = {name: value for name, value in json.loads(values["body"]).items() if value is not None}
    try:
        _refuse(body)
        if values["url"] == CHAT:
            return _messages(body.get("messages")), _sampling(body, values, tokens)
        return prompts_of(body)[values["prompt_index"]], _sampling(body, values, tokens)
    except BadRequest as error:
        raise RowError("bad_request", str(error)) from None


def _refuse(body: Mapping[str, Any]) -> None:
    for name, nothing in _REFUSED.items():
        same_as_n = name == "best_of" and body.get(name) == body.get("n")
        if name in body and body[name] not in nothing and not same_as_n:
            raise BadRequest(f"{name} is {shortened(body[name])}, which is not supported: leave it out")


def _sampling(body: Mapping[str, Any], values: Mapping[str, Any], tokens: bool) -> SamplingParams:
    chat = values["url"] == CHAT
    fields: dict[str, Any] = {
        "temperature": _number("temperature", body.get("temperature", 1.0)),
        "max_tokens": None if chat else _COMPLETION_TOKENS,
        # The row's position tells the choices and the lines apart, whatever the seed.
        "seed": _whole("seed", body.get("seed", 0), -_INT64) % _INT64,
        "logprobs": values.get("logprobs"),
    }
    if fields["logprobs"] is None and tokens:
        fields["logprobs"] = 0
    for name in ("max_tokens", "max_completion_tokens"):
        if name in body:
            fields["max_tokens"] = _whole(name, body[name], 1)
    for name in _NUMBERS:
        if name in body:
            fields[name] = _number(name, body[name])
    if "min_tokens" in body:
        fields["min_tokens"] = _whole("min_tokens", body["min_tokens"], 0)
    if "top_k" in body:
        fields["top_k"] = max(0, _whole("top_k", body["top_k"], -1))  # -1 is off, too
    for name, field in _FLAGS.items():
        if name in body:
            if not isinstance(body[name], bool):
                raise BadRequest(f"{name} is {shortened(body[name])}, but it must be true or false")
            fields[field] = body[name]
    if "stop" in body:
        stop = body["stop"]
        fields["stop"] = (stop,) if isinstance(stop, str) else _list("stop", stop, str, "texts")
    if "stop_token_ids" in body:
        fields["stop_token_ids"] = _list("stop_token_ids", body["stop_token_ids"], int, "token ids")
    if "logit_bias" in body:
        fields["logit_bias"] = _logit_bias(body["logit_bias"])
    try:
        return SamplingParams(**fields)
    except ValueError as error:
        raise BadRequest(str(error)) from None


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise BadRequest(f"messages is {shortened(value)}, but it must be a list of messages")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequest(
                f"messages[{number}] is {shortened(message)}, but it must have a role and a content"
            )
        plain = {name: inner for name, inner in message.items() if inner is not None}
        if plain["role"] == "developer":
            plain["role"] = "system"  # its new name, which few chat templates know
        plain["content"] = _content(number, plain)
        messages.append(plain)
    return tuple(messages)


def _content(number: int, message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message.get("tool_calls"):
        return ""
    if not isinstance(content, list):
        raise BadRequest(
            f"messages[{number}].content is {shortened(content)}, but it must be a text or text parts"
        )
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise BadRequest(
                f"messages[{number}].content holds a part of type {shortened(kind)}, but only text is read"
            )
        texts.append(text)
    return "\n".join(texts)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRequest(f"{name} is {shortened(value)}, but it must be a number")
    return float(value)


def _whole(name: str, value: Any, least: int) -> int:
    return whole_number(name, value, least, _INT64 - 1)


def _list(name: str, value: Any, kind: type, rule: str) -> tuple[Any, ...]:
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise BadRequest(f"{name} is {shortened(value)}, but it must be a list of {rule}")
    return tuple(value)


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise BadRequest(f"logit_bias is {shortened(value)}, but it must map token ids to numbers")
    biases = {}
    for token, bias in value.items():
        if not token.isdecimal():
            raise BadRequest(f"logit_bias names {shortened(token)}, but its keys must be token ids")
        biases[int(token)] = _number(f"logit_bias of {token}", bias)
    return biases
