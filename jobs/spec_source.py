"""Where a job spec comes from: a YAML or JSON file, a mapping, and overrides from the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from batchinfer.connectors.storage import normalize_uri, open_store
from batchinfer.jobs.spec import JobSpec, parse_spec
from batchinfer.jobs.types import JobError

_KEY = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([^.="']+))\s*([.=])""")


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: a key given twice is an error, and 1e-4 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int) and key in keys:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key} is given twice", problem_mark=key_node.start_mark
                )
            if isinstance(key, str | int):
                keys.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """The value that YAML or JSON text gives; raises JobError naming the line that is wrong."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise JobError(f"{where}{line} is not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise JobError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def apply_override(data: Any, override: str) -> dict[str, Any]:
    """``data`` with one ``a.b=value`` applied: the value is YAML, a key with dots in it is quoted.

    Raises JobError where the override has no such form or its path leads through a plain value.
    """
    path: list[str] = []
    position, separator = 0, "."
    while separator == ".":
        match = _KEY.match(override, position)
        if match is None:
            raise JobError(f"--set {override}: write it as key=value, such as sampling.max_tokens=64")
        path.append(next(group for group in match.groups() if group is not None).strip())
        separator, position = match.group(4), match.end()
    text = override[position:]
    # A template begins like a YAML mapping, but is none.
    is_template = text.lstrip().startswith(("{{", "{%"))
    value = text if is_template else parse_yaml(text, f"--set {override}")
    return _replaced(data, path, value, override)


def _replaced(data: Any, path: Sequence[str], value: Any, override: str) -> dict[str, Any]:
    if data is None:
        data = {}
    if isinstance(data, str) and path[0] in ("source", "dtype", "quantize", "max_context", "kv_dtype"):
        data = {"source": data}  # the model was given as a string
    if not isinstance(data, Mapping):
        raise JobError(
            f"--set {override}: {path[0]} can't be set, as what holds it is {data!r} in the job spec"
        )
    inner = value if len(path) == 1 else _replaced(data.get(path[0]), path[1:], value, override)
    return {**data, path[0]: inner}


def load_spec(source: str | Path | Mapping[str, Any] | JobSpec, overrides: Sequence[str] = ()) -> JobSpec:
    """A spec from a YAML or JSON file (a path or a URI), a mapping, or a spec.

    ``overrides`` are ``a.b=value`` with the value in YAML. Raises JobError in one sentence, and
    StorageError where a store refuses to give the file.
    """
    return parse_spec(*read_spec(source, overrides))


def read_spec(
    source: str | Path | Mapping[str, Any] | JobSpec, overrides: Sequence[str] = ()
) -> tuple[Any, str]:
    """The values of a spec before they are checked, and what to call it in errors; see ``load_spec``."""
    data: Any
    if isinstance(source, JobSpec):
        data, where = source.model_dump(mode="json"), "the job spec"
    elif isinstance(source, Mapping):
        data, where = source, "the job spec"
    else:
        where = str(source)
        data = parse_yaml(_read_text(where), where)
    for override in overrides:
        data = apply_override(data, override)
    return data, where


def located(spec: JobSpec) -> JobSpec:
    """The spec with absolute addresses, so that it means the same to workers that start elsewhere.

    Raises StorageError for an address of an unknown kind.
    """
    source = spec.model.source
    if "://" not in source and Path(source).expanduser().exists():
        source = normalize_uri(source)
    return spec.model_copy(
        update={
            "model": spec.model.model_copy(update={"source": source}),
            "input": spec.input.model_copy(
                update={"uri": tuple(normalize_uri(uri) for uri in spec.input.uri)}
            ),
            "output": spec.output.model_copy(update={"uri": normalize_uri(spec.output.uri)}),
        }
    )


def _read_text(where: str) -> str:
    if "://" in where:
        folder, _, name = where.rpartition("/")
        try:
            return open_store(folder).get(name).decode("utf-8")
        except FileNotFoundError:
            raise JobError(
                f"{where} is not there: give the address of a job spec in YAML or JSON"
            ) from None
        except UnicodeDecodeError:
            raise JobError(f"{where} is not a text file: give a job spec in YAML or JSON") from None
    try:
        return Path(where).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError:
        raise JobError(f"{where} is not there: give the path of a job spec in YAML or JSON") from None
    except UnicodeDecodeError:
        raise JobError(f"{where} is not a text file: give the path of a job spec in YAML or JSON") from None
    except OSError as error:
        raise JobError(
            f"{where} can't be read ({error.strerror}): give the path of a job spec in YAML or JSON"
        ) from None
