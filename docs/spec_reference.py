"""Writes job-spec.md from the job spec's JSON Schema: python docs/spec_reference.py > docs/job-spec.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from batchinfer.jobs.spec import JobSpec

HEAD = """\
# Job spec

A job spec is a YAML or JSON file. This one has every part:

```yaml
# job.yaml
name: summaries
model: {source: Qwen/Qwen3-0.6B, dtype: bf16, max_context: 4096}
input: {uri: "s3://bucket/prompts/*.parquet", columns: [id, language]}
messages:
  - {role: system, content: "You answer in {{ language }}."}
  - {role: user, content: "Summarise this:\\n\\n{{ text }}"}
sampling: {max_tokens: 128, temperature: 0.0}
output: {uri: "s3://bucket/summaries/"}
shards: {rows: 10000}
workers: {count: 8, backend: local}
price: {usd_per_hour: 2.50}
budget: {max_usd: 100.0}
failures: {max_share: 0.05}
storage:
  "s3://bucket/": {region: eu-central-1}
```

`model`, `input`, `output` and exactly one of `prompt`, `messages`, `prompt_column` and `messages_column`
must be given; with `input.format: openai` none of the four. A key that is not listed here is refused.
`--set` changes a field for one command: `batchinfer plan job.yaml --set sampling.max_tokens=32`.
`batchinfer schema` prints the JSON Schema, for editors.

`workers`, `price`, `budget` and `failures` may differ when a job is submitted again. All else makes it
another job, and is refused under the same `output.uri`.

## Templates

`prompt` and the contents of `messages` are [Jinja2](https://jinja.palletsprojects.com/) templates over the
row: `{{ text }}` is the column `text`. They run in Jinja's sandbox. A name that is no column is refused
before anything is spent. An expression that fails for a row makes that row a failure with the code
`render_error`.

This page is made from the schema.
"""


def main() -> None:
    """Print the page."""
    schema = JobSpec.model_json_schema()
    print(HEAD)
    print("\n".join(_sections(schema, schema["$defs"])))


def _sections(schema: dict[str, Any], parts: dict[str, Any]) -> Iterator[str]:
    yield from _section("The whole", "", schema, parts)
    for path, part in _parts(schema, parts):
        yield from _section(f"`{path}`", path, part, parts)


def _parts(schema: dict[str, Any], parts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every part of a spec that has fields of its own, with its path."""
    for name, field in schema["properties"].items():
        for part, suffix in _part_names(field):
            path = f"{prefix}{name}{suffix}"
            yield path, parts[part]
            yield from _parts(parts[part], parts, f"{path}.")


def _part_names(field: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The parts that a field holds, each with what stands after its name: nothing, [] or .URI."""
    if "$ref" in field:
        yield field["$ref"].rpartition("/")[2], ""
    for option in field.get("anyOf", ()):
        yield from _part_names(option)
    for key, suffix in (("items", "[]"), ("additionalProperties", ".PREFIX")):
        if isinstance(field.get(key), dict):
            for name, rest in _part_names(field[key]):
                yield name, suffix + rest


def _section(title: str, path: str, part: dict[str, Any], parts: dict[str, Any]) -> Iterator[str]:
    yield f"\n## {title}\n"
    yield f"{part['description'].strip()}\n"
    yield "| key | type | default | meaning | example |"
    yield "|---|---|---|---|---|"
    required = part.get("required", ())
    for name, field in part["properties"].items():
        inner = next(_part_names(field), None)
        meaning = (
            field.get("description") or parts[inner[0]]["description"] if inner else field["description"]
        )
        cells = [
            f"`{name}`",
            _type(field),
            "must be given" if name in required else _default(field),
            meaning.strip(),
            _example(field, f"{path}.{name}".lstrip("."), inner),
        ]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _type(field: dict[str, Any]) -> str:
    """What a field takes, in words."""
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "$ref" in field:
        return "mapping"
    if "anyOf" in field:
        kinds = [_type(option) for option in field["anyOf"] if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if field["type"] == "array":
        return f"list of {_type(field['items'])}s" if "$ref" not in field["items"] else "list of mappings"
    if field["type"] == "object":
        inner = field.get("additionalProperties")
        return (
            f"mapping to {_type(inner)}s" if isinstance(inner, dict) and "$ref" not in inner else "mapping"
        )
    return str(field["type"]) + _range(field)


def _range(field: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤"}
    found = [f"{sign} {field[key]:g}" for key, sign in signs.items() if key in field]
    return f", {', '.join(found)}" if found else ""


def _default(field: dict[str, Any]) -> str:
    if field.get("type") == "object":
        return "`{}`"
    if "$ref" in field or "default" not in field:
        return ""
    return f"`{json.dumps(field['default'], ensure_ascii=False)}`"


def _example(field: dict[str, Any], path: str, inner: tuple[str, str] | None) -> str:
    """The field's own example; of a choice one that is not the default, of a part where it is told."""
    if examples := field.get("examples"):
        return f"`{json.dumps(examples[0], ensure_ascii=False)}`"
    if inner is not None:
        return f"see `{path}{inner[1]}`"
    choices = [
        option for option in (field, *field.get("anyOf", ())) if "enum" in option or "const" in option
    ]
    if choices:
        values = choices[0].get("enum", [choices[0].get("const")])
        return f"`{json.dumps(next(value for value in reversed(values) if value != field.get('default')))}`"
    assert field["type"] == "boolean", f"{path} needs an example"
    return f"`{json.dumps(not field['default'])}`"


if __name__ == "__main__":
    main()
