"""What is wrong with a job spec, in one sentence: the field, its value, and what to do."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

_LONGEST_VALUE = 60


def rule(message: str, **context: typing.Any) -> PydanticCustomError:
    """An error whose message goes on after the field's path; ``field`` in its context extends that path."""
    return PydanticCustomError("rule", "{message}", {"message": message, **context})


def sentence(error: ValidationError, model: type[BaseModel]) -> str:
    """One sentence on the first thing that is wrong, and the names of other fields that are wrong too."""
    details = error.errors(include_url=False)
    first = _describe(details[0], model)
    others = list(dict.fromkeys(_path(detail) for detail in details[1:]))
    others = [path for path in others if path and path != _path(details[0])]
    return f"{first} (also wrong: {', '.join(others)})" if others else first


def _path(detail: ErrorDetails) -> str:
    """The dotted path of the field; a rule that concerns one field of a part names it in its context."""
    path = ""
    for part in detail["loc"]:
        if part == "[key]":
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    field = detail.get("ctx", {}).get("field")
    return ".".join(filter(None, (path, field)))


def _describe(detail: ErrorDetails, model: type[BaseModel]) -> str:
    path, kind = _path(detail), detail["type"]
    if kind == "extra_forbidden":
        return f"{path} is not a known field{_suggestion(detail, model)}"
    if kind == "missing":
        field = _fields(detail["loc"][:-1], model)[str(detail["loc"][-1])]
        meaning = f": {field.description}" if field.description else ""
        return f"{path} is missing, and must be given{meaning}"
    if kind == "rule":
        return f"{path} {detail['msg']}".strip()
    value = repr(detail["input"])
    if len(value) > _LONGEST_VALUE:
        value = value[:_LONGEST_VALUE] + "…"
    rule = detail["msg"].replace("Input should be", "it must be").replace("Input should", "it should")
    rule = rule.replace(
        "it must be a valid dictionary or instance of", "it must be a mapping of fields for"
    )
    return f"{path} is {value}, but {rule[:1].lower()}{rule[1:]}"


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    """The spec parts inside a field's annotation, such as StoreSpec in dict[str, StoreSpec]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models(argument)


def _fields(loc: tuple[int | str, ...], model: type[BaseModel]) -> dict[str, typing.Any]:
    """The fields of the part at ``loc``; list positions and mapping keys on the way are passed over."""
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            model = next(_models(model.model_fields[part].annotation), model)
    return dict(model.model_fields)


def _all_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for part in _models(field.annotation):
            yield from _all_paths(part, f"{prefix}{name}.")


def _suggestion(detail: ErrorDetails, model: type[BaseModel]) -> str:
    unknown = str(detail["loc"][-1])
    siblings = list(_fields(detail["loc"][:-1], model))
    near = difflib.get_close_matches(unknown, siblings, n=1, cutoff=0.6)
    elsewhere = [path for path in _all_paths(model) if path.rpartition(".")[2] == unknown]
    if near or elsewhere:
        return f"; did you mean {(near or elsewhere)[0]}?"
    return f"; the fields here are {', '.join(siblings)}"
