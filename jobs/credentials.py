"""What looks like a secret in a job spec, which is stored beside the answers: it is refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from batchinfer.jobs.spec_errors import rule

_CREDENTIAL = re.compile(
    r"(^|_)(key_id|secret|password|passwd|token|credentials?|connection_string|sas|"
    r"(access|account|api|private|secret|shared)_key)$|^(key|secret_access_key)$"
)
_URI_WITH_PASSWORD = re.compile(r"^[a-z][a-z0-9+.-]*://[^/@]*:[^/@]*@", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"(?<![A-Za-z0-9])(AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])|-----BEGIN [A-Z ]*PRIVATE KEY|"
    r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{30,}|[a-z][a-z0-9+.-]*://[^/@\s]*:[^/@\s]*@"
)
_ASSIGNMENT = re.compile(r"(?:^|[\s;])([A-Za-z_][A-Za-z0-9_]*)=[\"']?(?![\"'$\s])\S")


def looks_like_credential(key: str) -> bool:
    """Whether a key's name says that its value is a secret: ``aws_secret_access_key``, ``apiToken``."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).replace("-", "_").lower()
    return _CREDENTIAL.search(words) is not None


def refuse_credentials(value: Any, path: tuple[str, ...] = ()) -> None:
    """Raise the error that pydantic reports where ``value``, or what is in it, holds a secret."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if looks_like_credential(str(key)):
                raise rule(
                    "looks like a credential, and a job's spec is stored beside its output: remove it and "
                    "set it in the environment of the workers, or give them a role",
                    field=".".join((*path, str(key))),
                )
            refuse_credentials(inner, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for inner in value:
            refuse_credentials(inner, path)
    elif isinstance(value, str) and (
        _SECRET_VALUE.search(value) or any(map(looks_like_credential, _ASSIGNMENT.findall(value)))
    ):
        raise rule(
            "holds a credential, and a job's spec is stored beside its output: remove it and set it in the "
            "environment of the workers, or give them a role",
            field=".".join(path),
        )


def checked_uri(uri: str) -> str:
    """The URI, if it is one and holds no password."""
    if not uri.strip():
        raise rule("is empty, but it must be a path or a URI such as s3://bucket/folder/")
    if _URI_WITH_PASSWORD.match(uri):
        raise rule(
            "holds a credential, and a job's spec is stored beside its output: take it out of the URI and "
            "set it in the environment of the workers"
        )
    return uri


def without_credentials(value: Any) -> Any:
    """The value, if no secret is in it."""
    refuse_credentials(value)
    return value


def options_without_credentials(value: Any) -> Any:
    """Options may name variables whose values a service keeps as secrets, but not hold these values."""
    if not isinstance(value, Mapping):
        return value
    for backend, options in value.items():
        if isinstance(options, Mapping) and isinstance(options.get("secrets"), Mapping):
            for name, reference in options["secrets"].items():
                if not str(reference).startswith(("arn:", "projects/")):
                    raise rule(
                        "is no address of a secret: give where the service keeps it (arn:… or projects/…), "
                        "never its value",
                        field=f"{backend}.secrets.{name}",
                    )
            options = {key: inner for key, inner in options.items() if key != "secrets"}
        if isinstance(options, Mapping):  # what tolerations call a key is the name of a taint
            options = {key: inner for key, inner in options.items() if key != "tolerations"}
        refuse_credentials(options, (str(backend),))
    return value
