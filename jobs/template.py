"""A prompt template: Jinja2 in its sandbox, with bounds on what one row may use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, meta, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from batchinfer.jobs.types import RowError

# What one row may use before its template counts as running away.
MAX_STEPS = 100_000
MAX_CHARACTERS = 16 * 2**20

_STEPS = "\0steps"  # no template can spell this name


class _NullValue(Exception):
    """A template printed a null."""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with loops and calls counted and the operators that make large values bounded."""

    intercepted_binops = frozenset({"*", "**"})

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _steps(context).take()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, Sequence) and isinstance(times, int):
                    _bound(len(value) * times)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _bound(left.bit_length() * right)
        return super().call_binop(context, operator, left, right)


def _bound(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise SecurityError(f"the template makes a value of more than {MAX_CHARACTERS:,} characters")


class _Steps:
    """Loop iterations and calls of one render."""

    def __init__(self) -> None:
        self.taken = 0

    def take(self, count: int = 1) -> None:
        self.taken += count
        if self.taken > MAX_STEPS:
            raise SecurityError(f"the template takes more than {MAX_STEPS:,} steps")


def _steps(context: Context) -> _Steps:
    steps = context.resolve(_STEPS)
    assert isinstance(steps, _Steps)
    return steps


@pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _steps(context).take()
        yield item


@pass_context
def _bounded_range(context: Context, *bounds: int) -> range:
    """range() whose length is bounded by the steps of a row."""
    numbers = range(*bounds)
    _steps(context).take(len(numbers))
    return numbers


def _not_null(value: Any) -> Any:
    if value is None:
        raise _NullValue
    return value


def _environment() -> _Environment:
    environment = _Environment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_not_null)
    del environment.globals["lipsum"]
    environment.globals["range"] = _bounded_range
    environment.filters["\0counted"] = _counted
    return environment


@dataclass(frozen=True, slots=True)
class Template:
    """A compiled template: ``columns`` are the input columns that it reads."""

    where: str
    columns: tuple[str, ...]
    _render: Callable[[Mapping[str, Any]], Iterator[str]]

    def render(self, values: Mapping[str, Any]) -> str:
        """The text for one row; raises RowError with the code ``render_error``."""
        variables = {**values, _STEPS: _Steps()}
        variables.setdefault("row", values)
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._render(variables):
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise SecurityError(f"the prompt has more than {MAX_CHARACTERS:,} characters")
                pieces.append(piece)
        except _NullValue:
            null = ", ".join(name for name in self.columns if values.get(name) is None) or "a value"
            raise RowError(
                "render_error",
                f"the template in {self.where} prints {null}, which is null on this row: write "
                '{{ column or "" }} where a null is meant to be empty',
            ) from None
        except Exception as error:
            # Whatever the template's expressions do to this row's values, only this row fails.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RowError(
                "render_error", f"the template in {self.where} fails on this row: {reason}"
            ) from None
        return "".join(pieces)


def compile_template(where: str, source: str, input_columns: Sequence[str]) -> Template:
    """The template, compiled; ``row`` is the whole row, for columns whose names are no identifiers.

    Raises jinja2.TemplateError: a syntax error, or what the sandbox forbids and is plain without a row.
    """
    environment = _environment()
    for name in input_columns:
        environment.globals.pop(name, None)  # the column hides it
    tree = environment.parse(source)
    for node in tree.find_all((nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)):
        raise TemplateSyntaxError("a prompt can't include or import other templates", node.lineno)
    columns = _columns(tree, input_columns)
    for loop in tree.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, "\0counted", [], [], None, None, lineno=loop.lineno)
    return Template(where, columns, environment.from_string(tree).generate)


def _columns(tree: nodes.Template, input_columns: Sequence[str]) -> tuple[str, ...]:
    names = meta.find_undeclared_variables(tree)
    if "row" in names and "row" not in input_columns:
        names.remove("row")
        names |= _row_keys(tree, input_columns)
    return tuple(sorted(names))


def _row_keys(tree: nodes.Template, input_columns: Sequence[str]) -> set[str]:
    """Columns read as ``row["a b"]`` or ``row.a``; every column where ``row`` is used otherwise."""
    whole = sum(1 for name in tree.find_all(nodes.Name) if _is_row(name))
    keys: set[str] = set()
    for item in tree.find_all(nodes.Getitem):
        if _is_row(item.node) and isinstance(item.arg, nodes.Const) and isinstance(item.arg.value, str):
            keys.add(item.arg.value)
            whole -= 1
    for attribute in tree.find_all(nodes.Getattr):
        if _is_row(attribute.node):
            keys.add(attribute.attr)
            whole -= 1
    return keys if whole == 0 else keys | set(input_columns)


def _is_row(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == "row"
