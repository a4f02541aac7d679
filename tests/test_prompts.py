"""Prompts: rows rendered to text and messages, what a template may do, and what fails a row or a job."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.jobs.prompts import Prompts, compile_prompts
from batchinfer.jobs.spec import parse_spec
from batchinfer.jobs.types import JobError, RowError

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())]))
SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("number", pa.int64()),
        ("tags", pa.list_(pa.string())),
        ("chat", MESSAGES),
        ("chat_json", pa.string()),
        ("blob", pa.binary()),
        ("First Name", pa.string()),
        ("kind", pa.dictionary(pa.int32(), pa.string())),
    ]
)


def prompts(schema: pa.Schema = SCHEMA, **how: Any) -> Prompts:
    return compile_prompts(
        parse_spec({"model": "m", "input": {"uri": "in"}, "output": {"uri": "out"}, **how}), schema
    )


def render(template: str, **values: Any) -> Any:
    return prompts(prompt=template).render(dict.fromkeys(SCHEMA.names) | values)


def test_a_template_over_the_row() -> None:
    compiled = prompts(
        prompt="{{ text }} is {{ number + 1 }}{% for tag in tags %} #{{ tag }}{% endfor %}\n"
    )
    assert compiled.columns == ("number", "tags", "text")
    assert compiled.render({"text": "a", "number": 1, "tags": ["x", "y"]}) == "a is 2 #x #y\n"


@given(st.text())
def test_values_are_neither_escaped_nor_templates(text: str) -> None:
    assert render("<{{ text }}>", text=text) == f"<{text}>"


def test_columns_that_are_no_identifiers_are_read_through_row() -> None:
    compiled = prompts(prompt='{{ row["First Name"] }} {{ row.text }}')
    assert compiled.columns == ("First Name", "text")
    assert compiled.render({"First Name": "Ada", "text": "b"}) == "Ada b"
    assert set(prompts(prompt="{{ row | tojson }}").columns) == set(SCHEMA.names)


def test_a_column_hides_the_global_of_its_name() -> None:
    schema = pa.schema([("range", pa.string()), ("row", pa.string())])
    compiled = prompts(schema, prompt="{{ range }} {{ row }}")
    assert compiled.columns == ("range", "row")
    assert compiled.render({"range": "a", "row": "b"}) == "a b"


def test_chat_messages() -> None:
    compiled = prompts(
        messages=[
            {"role": "system", "content": "Be {{ kind }}."},
            {"role": "user", "content": "{{ text }}"},
        ]
    )
    assert compiled.columns == ("kind", "text")
    assert compiled.render({"kind": "brief", "text": "a"}) == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
    )


@pytest.mark.parametrize(
    ("name", "value", "text"), [("text", "a", "a"), ("number", 3, "3"), ("kind", "k", "k")]
)
def test_a_prompt_column(name: str, value: Any, text: str) -> None:
    compiled = prompts(prompt_column=name)
    assert compiled.columns == (name,)
    assert compiled.render({name: value}) == text
    with pytest.raises(RowError) as failed:
        compiled.render({name: None})
    assert failed.value.code == "render_error"


def test_a_messages_column_as_structs_and_as_json() -> None:
    chat = [{"role": "user", "content": "a", "name": None}]
    expected = ({"role": "user", "content": "a"},)
    assert prompts(messages_column="chat").render({"chat": chat}) == expected
    assert prompts(messages_column="chat_json").render({"chat_json": json.dumps(chat)}) == expected


@pytest.mark.parametrize(
    "value", [None, "", "{", "[]", "{}", "[1]", '[{"role": "user"}]', '[{"role": 1, "content": "a"}]', "3"]
)
def test_messages_that_are_none_fail_the_row(value: str | None) -> None:
    with pytest.raises(RowError) as failed:
        prompts(messages_column="chat_json").render({"chat_json": value})
    assert failed.value.code == "render_error"
    assert "chat_json" in failed.value.message


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"prompt": "{{ txt }}"}, ["prompt", "txt", "text, number"]),
        ({"prompt": '{{ row["txt"] }}'}, ["prompt", "txt", "text, number"]),
        ({"prompt": "{{ text }"}, ["prompt", "line 1", "template"]),
        ({"prompt": "a\n{% if text %}"}, ["prompt", "line 2", "template"]),
        ({"prompt": "{{ text | uper }}"}, ["prompt", "uper"]),
        ({"prompt": "{% include '/etc/passwd' %}"}, ["prompt", "include"]),
        ({"prompt": "{% import 'x' as y %}{{ text }}"}, ["prompt", "include or import"]),
        ({"messages": [{"role": "user", "content": "{{ txt }}"}]}, ["messages[0].content", "txt"]),
        ({"prompt_column": "txt"}, ["prompt_column", "txt", "text, number"]),
        ({"prompt_column": "tags"}, ["prompt_column", "tags", "list"]),
        ({"prompt_column": "blob"}, ["prompt_column", "blob", "binary"]),
        ({"messages_column": "chats"}, ["messages_column", "chats", "chat_json"]),
        ({"messages_column": "tags"}, ["messages_column", "tags", "role and content"]),
        ({"messages_column": "number"}, ["messages_column", "number", "int64"]),
    ],
)
def test_what_fails_the_job(how: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(JobError) as refused:
        prompts(**how)
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


def test_a_null_is_never_printed_as_none() -> None:
    with pytest.raises(RowError, match="prints text, which is null"):
        render("{{ text }}")
    assert render('{{ text or "" }}|{% if text %}{{ text }}{% endif %}') == "|"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] ~ ''['__cl' ~ 'ass__'].__mro__ }}",
        "{{ text | attr('__class__') }}",
        "{{ ''.format.__globals__ }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(text) }}",
        "{{ range.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ joiner.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ row.pop('text') }}",
        "{{ row.update({'text': 1}) }}",
        "{{ tags.append('x') }}",
        "{{ tags.clear() }}",
        "{% set row.text = 'x' %}",
        "{{ lipsum(n=1000000000) }}",
    ],
)
def test_the_sandbox_holds(template: str) -> None:
    values = {"text": "a", "tags": ["x"]}
    try:
        compiled = prompts(prompt=template)
    except JobError:
        return
    with pytest.raises(RowError) as failed:
        text = compiled.render(values)
        raise AssertionError(text)
    assert failed.value.code == "render_error"
    assert values == {"text": "a", "tags": ["x"]}


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10 ** 12) %}x{% endfor %}",
        "{% for i in range(60000) %}{% for j in range(60000) %}{% endfor %}{% endfor %}",
        "{% for a in 'x' * 400 %}{% for b in 'x' * 400 %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
        "{{ 'x' * 10 ** 12 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set n = namespace(t=text) %}"
        "{% for i in range(40) %}{% set n.t = n.t ~ n.t %}{{ n.t }}{% endfor %}",
    ],
)
def test_a_template_that_runs_away_fails_its_row_and_soon(template: str) -> None:
    with pytest.raises(RowError) as failed:
        render(template, text="abc")
    assert failed.value.code == "render_error"


def test_loops_keep_their_variables() -> None:
    template = (
        "{% for t in tags %}{{ loop.index }}/{{ loop.length }}{{ '' if loop.last else ',' }}{% endfor %}"
    )
    assert render(template, tags=["a", "b"]) == "1/2,2/2"
    nested = "{% for t in tags recursive %}{{ t }}{% endfor %}{% for t in [] %}{% else %}none{% endfor %}"
    assert render(nested, tags=["a", "b"]) == "abnone"


def test_an_error_in_an_expression_fails_the_row_only() -> None:
    compiled = prompts(prompt="{{ 1 // number }}")
    with pytest.raises(RowError, match="prompt fails on this row"):
        compiled.render({"number": 0})
    assert compiled.render({"number": 1}) == "1"
