"""A data set cut into shards, with its rows, tokens, time and price: everything known before it runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from batchinfer.connectors.readers import discover, read_split, scan_input
from batchinfer.connectors.types import BadRow, InputFile, Row, Split
from batchinfer.jobs.columns import output_schema
from batchinfer.jobs.estimate import Estimate, estimate
from batchinfer.jobs.inspection import inspect_model
from batchinfer.jobs.prefixes import cached_tokens
from batchinfer.jobs.prompts import compile_prompts, widest_sampling
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.survey import Survey, take_survey
from batchinfer.jobs.types import JobError, Shard

SHARD_SECONDS = 180.0
SHARDS_PER_WORKER = 4
FEWEST_ROWS, MOST_ROWS = 16, 50_000
MOST_SHARDS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a job consists of: ``schema`` is that of its parts, ``input_schema`` that of its input;
    ``survey`` is what was looked at of its rows."""

    spec: JobSpec
    files: tuple[InputFile, ...]
    input_schema: pa.Schema
    schema: pa.Schema
    shards: tuple[Shard, ...]
    fingerprint: str
    estimate: Estimate
    survey: Survey = field(compare=False, repr=False)

    @property
    def rows(self) -> int:
        """Rows of the whole input."""
        return sum(shard.rows for shard in self.shards)

    def check(self) -> None:
        """Raise AssertionError unless every row is in exactly one shard, in the order of the input."""
        position = 0
        for index, shard in enumerate(self.shards):
            assert shard.index == index
            assert shard.splits, f"shard {index} is empty"
            for split in shard.splits:
                assert split.first_row == position, (
                    f"shard {index} begins at {split.first_row}, not {position}"
                )
                assert split.rows > 0
                position += split.rows


def find_input(spec: JobSpec) -> list[InputFile]:
    """The input's files as they are now. Raises StorageError, and JobError where the job would read its
    own output."""
    for uri in spec.input.uri:
        if _covers(uri, spec.output.uri):
            raise JobError(
                f"output.uri is {spec.output.uri}, which lies inside the input {uri}: choose a folder "
                "outside of it, so that the job never reads its own answers"
            )
    return discover(spec.input.uri, spec.input.format, spec.storage_options())


def make_plan(spec: JobSpec) -> Plan:
    """Plan a job whose addresses are absolute (``spec_source.located``).

    Raises JobError, StorageError and ModelError: every mistake that can be seen before a worker starts.
    """
    storage = spec.storage_options()
    scan = scan_input(find_input(spec), storage, spec.shards.rows, spec.input.delimiter)
    if scan.rows == 0:
        raise JobError(
            f"the input {', '.join(spec.input.uri)} has no rows: correct input.uri, or nothing is to do"
        )
    prompts = compile_prompts(spec, scan.schema)
    schema = output_schema(_passed(spec, scan.schema), *widest_sampling(spec, scan.schema))
    model = inspect_model(spec)

    def read(split: Split) -> Iterable[Row | BadRow]:
        return read_split(split, scan.schema, prompts.columns, storage)

    survey = take_survey(spec, scan, read, prompts, model)
    expected = estimate(spec, survey, sum(cached_tokens(survey.rows)), model)
    rows = spec.shards.rows or _shard_rows(scan.rows, expected, spec.workers.count)
    tokens_a_row = (expected.prompt_tokens + expected.completion_tokens) / scan.rows
    made = Plan(
        spec=spec,
        files=tuple(item.file for item in scan.files),
        input_schema=scan.schema,
        schema=schema,
        shards=tuple(_shards(scan.splits(rows), rows, tokens_a_row)),
        fingerprint=model.fingerprint,
        estimate=expected,
        survey=survey,
    )
    made.check()
    return made


def _passed(spec: JobSpec, schema: pa.Schema) -> pa.Schema:
    """The input's columns that go to the output."""
    if spec.input.columns is None:
        return schema
    for name in spec.input.columns:
        if name not in schema.names:
            raise JobError(
                f"input.columns names {name}, but the input has no such column: its columns are "
                f"{', '.join(schema.names)}"
            )
    return pa.schema([schema.field(name) for name in spec.input.columns])


def _shard_rows(rows: int, expected: Estimate, workers: int) -> int:
    """Rows of a shard: a few minutes of work, several shards a worker, and neither too few nor too many
    to keep in order; then evened out, so that the last shard is no smaller than it must be."""
    in_time = int(rows * SHARD_SECONDS / expected.worker_seconds) if expected.worker_seconds else rows
    wanted = min(in_time, -(-rows // (SHARDS_PER_WORKER * workers)), MOST_ROWS)
    wanted = max(wanted, FEWEST_ROWS, -(-rows // MOST_SHARDS))
    return -(-rows // -(-rows // wanted))


def _shards(splits: Sequence[Split], rows: int, tokens_a_row: float) -> Iterable[Shard]:
    """Consecutive splits together, as long as they have no more than ``rows`` rows."""
    taken: list[Split] = []
    count = index = 0
    for split in splits:
        if taken and count + split.rows > rows:
            yield Shard(index, tuple(taken), round(count * tokens_a_row))
            taken, count, index = [], 0, index + 1
        taken.append(split)
        count += split.rows
    yield Shard(index, tuple(taken), round(count * tokens_a_row))


def _covers(uri: str, output: str) -> bool:
    """Whether the input ``uri`` would find a part of a job in the folder ``output``."""
    before, recursive, _ = uri.partition("**")
    if recursive or not set(uri) & set("*?["):
        return f"{output}/".startswith(f"{before.rstrip('/')}/")
    return PurePosixPath(f"{_path(output)}/part-00000-of-00001.parquet").match(_path(uri))


def _path(uri: str) -> str:
    """A URI as an absolute path below its scheme."""
    return f"/{(uri.partition('://')[2] or uri).lstrip('/')}"


def plan_values(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values: counts and the estimate, not the shards themselves."""
    return {
        "input": {
            "files": len(plan.files),
            "bytes": sum(file.size for file in plan.files),
            "columns": {field.name: str(field.type) for field in plan.input_schema},
        },
        "rows": plan.rows,
        "shards": len(plan.shards),
        "rows_per_shard": max(shard.rows for shard in plan.shards),
        "workers": plan.spec.workers.count,
        "fingerprint": plan.fingerprint,
        "output_columns": plan.schema.names,
        "estimate": asdict(plan.estimate),
    }
