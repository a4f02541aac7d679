"""A job's spec as people may pass it on: YAML in which whatever may be a secret is hidden."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

HIDDEN = "(hidden)"
_SECRET_NAME = re.compile(
    r"secret|passw|credential|authorization|connection_string|(api|access|account|private)_?key"
    r"|(^|_)(key|token|sas|sig|signature)$",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(r"(\b\w*(?:secret|passw|credential|token|key)\w*\s*[=:]\s*)\S+", re.IGNORECASE)
_USER_INFO = re.compile(r"(\w://)[^/\s@]+@")
_QUERY = re.compile(r"(\w://[^\s?]+\?)\S+")
# What is sent to the model is shown as it is.
_PROMPTS = ("prompt", "messages")


class _Dumper(yaml.SafeDumper):
    """Writes a text of several lines as a block of these lines."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def shareable_spec(spec: Mapping[str, Any]) -> str:
    """The spec as YAML, without what is null.

    A spec holds no credentials where the schema can tell; but an environment, a shell line or an address
    may. So values named like a secret are hidden, every value of an environment, what a text assigns to
    a name like a secret's, and in addresses user and query.
    """
    values = {
        name: value if name in _PROMPTS else _hide(value)
        for name, value in spec.items()
        if value is not None
    }
    return yaml.dump(_plain(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=96)


def _hide(value: Any, name: str = "") -> Any:
    if isinstance(value, Mapping):
        if name == "env":
            return dict.fromkeys(value, HIDDEN)
        return {key: _hide(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hide(item) for item in value]
    if isinstance(value, str):
        if _SECRET_NAME.search(name):
            return HIDDEN
        shown = _ASSIGNED.sub(rf"\1{HIDDEN}", value)
        return _QUERY.sub(rf"\1{HIDDEN}", _USER_INFO.sub(rf"\1{HIDDEN}@", shown))
    return value


def _plain(value: Any) -> Any:
    """Values as YAML has them, without nulls and empty collections."""
    if isinstance(value, Mapping):
        kept = {key: _plain(item) for key, item in value.items() if item is not None}
        return {key: item for key, item in kept.items() if item not in ({}, [])}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
