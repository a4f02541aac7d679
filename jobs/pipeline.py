"""Batches of rows in, the same rows with answers out: jobs' prompts and columns inside a pipeline."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from batchinfer.engine.config import EngineConfig
from batchinfer.engine.engine import Engine
from batchinfer.engine.types import Completion, Rejection, Request, SamplingParams
from batchinfer.jobs.batch_kinds import BatchRows, rows_of
from batchinfer.jobs.columns import added_columns, output_schema, part_table
from batchinfer.jobs.models import local_model
from batchinfer.jobs.prompts import Prompts, compile_prompts
from batchinfer.jobs.samples import Charge, Finished
from batchinfer.jobs.spec import JobSpec, parse_spec
from batchinfer.jobs.types import JobError, RowError
from batchinfer.jobs.worker import engine_config

_WHERE = "map_batches"
_END = object()
_ERRORS = [pa.field("error_code", pa.string()), pa.field("error_message", pa.string())]

# One engine a configuration and process: frameworks hand every task a fresh copy of its function.
_ENGINES: dict[EngineConfig, Engine] = {}


class MapBatches:
    """Answers the rows of batches with a model: a class for ``ray.data.Dataset.map_batches``, and a
    callable of one batch.

        answers = dataset.map_batches(
            batchinfer.map_batches,
            fn_constructor_kwargs={"model": "org/model", "prompt": "Summarise: {{ text }}"},
            batch_format="pyarrow", num_gpus=1, concurrency=4,
        )
        for batch in batchinfer.map_batches("org/model", prompt="…").stream(record_batches): ...

    A batch is a pyarrow table or record batch, a pandas or polars frame, or a dict of numpy arrays; what
    comes out is of the same kind. The model is loaded with the first batch, once a process.
    """

    def __init__(
        self,
        model: str | Mapping[str, Any],
        *,
        prompt: str | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        prompt_column: str | None = None,
        messages_column: str | None = None,
        sampling: SamplingParams | Mapping[str, Any] | None = None,
        columns: Sequence[str] | None = None,
        tokens: bool = False,
        usd_per_hour: float | None = None,
        index_column: str | None = None,
        storage: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """All but ``index_column`` mean what they mean in a job spec (``columns``: ``input.columns``,
        ``tokens``: ``output.tokens``, ``usd_per_hour``: ``price.usd_per_hour``).

        ``index_column`` names the column that holds each row's position in the whole data set, which
        sampling noise depends on; without it rows are counted within a stream, or within a batch.
        Raises JobError in one sentence for what a job spec would be refused for.
        """
        given = {
            "model": model,
            "prompt": prompt,
            "messages": messages,
            "prompt_column": prompt_column,
            "messages_column": messages_column,
            "input": {"uri": "batches", "columns": columns},
            "output": {"uri": "batches", "tokens": tokens},
            "price": {"usd_per_hour": usd_per_hour},
            "storage": storage or {},
        }
        if isinstance(sampling, Mapping):
            given["sampling"] = sampling
        self._spec: JobSpec = parse_spec(given, _WHERE)
        self._sampling = self._spec.sampling_params()
        if isinstance(sampling, SamplingParams):
            logprobs = 0 if tokens and sampling.logprobs is None else sampling.logprobs
            self._sampling = replace(sampling, logprobs=logprobs)
        self._index_column = index_column

    def __call__(self, batch: Any) -> Any:
        """The batch's rows with their answers, in their order."""
        return next(self.stream([batch]))

    def stream(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Each batch with its answers, in order; the engine works on the next ones meanwhile.

        Batches are read ahead while fewer rows than the engine's window are unfinished or wait for those
        before them, so memory is bounded by that many rows and one batch. Raises JobError for a batch
        that the settings don't fit, ModelError for a model that can't be loaded, and RuntimeError where
        another stream of this process is using the engine.
        """
        engine = self._engine()
        if engine.has_work:
            raise RuntimeError("the engine is busy with another stream of this process; finish that first")
        source, counter = iter(batches), itertools.count()
        waiting: deque[_OpenBatch] = deque()
        rows: dict[int, tuple[_OpenBatch, int]] = {}
        exhausted = False
        try:
            while True:
                while not exhausted and sum(batch.rows.count for batch in waiting) < engine.config.window:
                    following = next(source, _END)
                    if following is _END:
                        exhausted = True
                    else:
                        waiting.append(self._begin(rows_of(following), counter, rows, engine))
                while waiting and waiting[0].complete(self._sampling.n):
                    yield self._joined(waiting.popleft())
                if exhausted and not waiting:
                    return
                for item in engine.step():
                    batch, place = rows[item.index]
                    batch.take(item, place, self._spec.price.usd_per_hour)
                    if batch.settled(place, self._sampling.n):
                        del rows[item.index]
        finally:
            for index in rows:
                engine.drop(index)
            engine.settle()

    def _engine(self) -> Engine:
        config = engine_config(self._spec)
        engine = _ENGINES.get(config)
        if engine is None:
            source = local_model(config.model, self._spec.storage_options())
            settings = {name: getattr(config, name) for name in config.__dataclass_fields__}
            engine = _ENGINES[config] = Engine(**{**settings, "model": source})
        return engine

    def _begin(
        self,
        batch: BatchRows,
        counter: Iterator[int],
        rows: dict[int, tuple[_OpenBatch, int]],
        engine: Engine,
    ) -> _OpenBatch:
        """Render a batch's rows and give them to the engine."""
        schema = batch.schema
        prompts = compile_prompts(self._spec, schema)
        passed = self._passed(schema)
        wanted = [*prompts.columns, *([self._index_column] if self._index_column else [])]
        table = batch.arrow(list(dict.fromkeys(wanted)))
        opened = _OpenBatch(batch, passed, self._indices(table, batch.count, counter))
        requests = []
        for place, (index, prompt) in enumerate(
            zip(opened.indices, _prompts(prompts, table, batch.count), strict=True)
        ):
            if index in rows:
                raise JobError(f"{_WHERE}: index_column {self._index_column} holds {index} more than once")
            if isinstance(prompt, RowError):
                opened.failed[place] = (prompt.code, prompt.message)
            else:
                rows[index] = (opened, place)
                requests.append(Request(index, prompt, self._sampling))
        engine.add(requests)
        return opened

    def _passed(self, schema: pa.Schema) -> list[str]:
        """The columns that pass through; raises JobError where one is missing, or collides."""
        names = schema.names if self._spec.input.columns is None else list(self._spec.input.columns)
        for name in names:
            if name not in schema.names:
                raise JobError(
                    f"{_WHERE}: columns names {name}, but the batch has no such column: its columns are "
                    f"{', '.join(schema.names)}"
                )
        for own in _ERRORS:
            if own.name in names:
                raise JobError(
                    f"{_WHERE}: the batch's column {own.name} would collide with the output's column "
                    f"{own.name}: rename it, or leave it out of columns"
                )
        output_schema(pa.schema([schema.field(name) for name in names]), self._sampling, self._tokens)
        return names

    @property
    def _tokens(self) -> bool:
        return self._spec.output.tokens

    def _indices(self, table: pa.Table, count: int, counter: Iterator[int]) -> list[int]:
        if self._index_column is None:
            return list(itertools.islice(counter, count))
        column = table[self._index_column]
        if not pa.types.is_integer(column.type) or column.null_count:
            raise JobError(f"{_WHERE}: index_column {self._index_column} must hold an integer on every row")
        return [int(value) for value in column.to_pylist()]

    def _joined(self, batch: _OpenBatch) -> Any:
        """The batch with its answers: one row a sample; a failed row has its error, and counts of 0."""
        added = added_columns(self._sampling, self._tokens)
        done = sorted(batch.done, key=lambda item: (item[0], item[1].completion.sample_index))
        answered = part_table(added, pa.table({}), [sample for _, sample in done])
        schema = pa.schema([column.with_nullable(True) for column in added] + _ERRORS)
        for own in _ERRORS:
            answered = answered.append_column(own, pa.nulls(len(done), own.type))
        failures = [
            {
                **{column.name: 0 for column in added if not column.nullable and _counts(column.type)},
                "row_index": batch.indices[place],
                "error_code": code,
                "error_message": message,
            }
            for place, (code, message) in sorted(batch.failed.items())
        ]
        failed = pa.Table.from_pylist(failures, schema=schema)
        table = pa.concat_tables([answered.cast(schema), failed])
        places = [place for place, _ in done] + sorted(batch.failed)
        order = sorted(range(len(places)), key=places.__getitem__)
        return batch.rows.joined(
            batch.passed, [places[position] for position in order], table.take(pa.array(order, pa.int64()))
        )


def _counts(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


@dataclass(slots=True)
class _OpenBatch:
    """A batch whose rows are being answered; rows go by their place in it."""

    rows: BatchRows
    passed: list[str]
    indices: list[int]
    done: list[tuple[int, Finished]] = field(default_factory=list)
    failed: dict[int, tuple[str, str]] = field(default_factory=dict)
    samples: dict[int, int] = field(default_factory=dict)

    def take(self, item: Completion | Rejection, place: int, usd_per_hour: float | None) -> None:
        """One row's sample, or why it has none."""
        if isinstance(item, Rejection):
            self.failed[place] = (item.code, item.message)
            return
        charge = Charge("", usd_per_hour, item.prefill_ns, item.decode_ns, len(item.token_ids))
        self.done.append((place, Finished(item, (charge,))))
        self.samples[place] = self.samples.get(place, 0) + 1

    def settled(self, place: int, n: int) -> bool:
        """Whether nothing of the row is to come."""
        return place in self.failed or self.samples.get(place) == n

    def complete(self, n: int) -> bool:
        """Whether every row is settled."""
        return len(self.done) == n * (self.rows.count - len(self.failed))


def _prompts(prompts: Prompts, table: pa.Table, count: int) -> Iterator[Any]:
    """Each row's prompt, or the RowError that it gives."""
    render: Callable[[Mapping[str, Any]], Any] = prompts.render
    columns = {name: table[name].to_pylist() for name in table.column_names}
    for place in range(count):
        try:
            yield render({name: values[place] for name, values in columns.items()})
        except RowError as error:
            yield error


map_batches = MapBatches
