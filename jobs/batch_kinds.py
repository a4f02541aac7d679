"""What pipelines call a batch: Arrow tables, frames and dicts of arrays, by one set of operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batchinfer.jobs.types import JobError


@dataclass(frozen=True, slots=True)
class BatchRows:
    """The rows of a batch of any kind.

    ``schema`` has all its columns; those that have no Arrow type have the type null. ``arrow`` gives some
    of them. ``joined`` gives a batch of the same kind: the rows of the named columns at these places, which
    may repeat, beside the columns of a table of as many rows.
    """

    count: int
    schema: pa.Schema
    arrow: Callable[[list[str]], pa.Table]
    joined: Callable[[list[str], Sequence[int], pa.Table], Any]


def rows_of(batch: Any) -> BatchRows:
    """The rows of a pyarrow table or record batch, a pandas or polars frame, or a dict of numpy arrays.

    Raises JobError for anything else.
    """
    if isinstance(batch, pa.Table):
        return _arrow_rows(batch, lambda table: table)
    if isinstance(batch, pa.RecordBatch):
        return _arrow_rows(pa.Table.from_batches([batch]), _one_batch)
    if isinstance(batch, dict):
        return _dict_rows(batch)
    kind = f"{type(batch).__module__.partition('.')[0]}.{type(batch).__name__}"
    if kind == "pandas.DataFrame":
        return _pandas_rows(batch)
    if kind == "polars.DataFrame":
        return _polars_rows(batch)
    raise JobError(
        f"the batch is a {kind}, but it must be a pyarrow table or record batch, a pandas or polars frame, "
        "or a dict of numpy arrays"
    )


def _arrow_rows(table: pa.Table, back: Callable[[pa.Table], Any]) -> BatchRows:
    def joined(names: list[str], places: Sequence[int], added: pa.Table) -> Any:
        kept = table.select(names).take(pa.array(places, pa.int64()))
        # The types of columns stay as they are.
        fields = [*kept.schema, *added.schema]
        return back(pa.Table.from_arrays([*kept.columns, *added.columns], schema=pa.schema(fields)))

    return BatchRows(table.num_rows, table.schema, table.select, joined)


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    arrays = [
        column.combine_chunks() if column.num_chunks != 1 else column.chunk(0) for column in table.columns
    ]
    arrays = [array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array for array in arrays]
    return pa.RecordBatch.from_arrays(arrays, schema=table.schema)


def _dict_rows(batch: dict[str, Any]) -> BatchRows:
    import numpy as np

    columns = {name: np.asarray(values) for name, values in batch.items()}
    counts = {len(values) for values in columns.values()}
    if len(counts) != 1:
        raise JobError("the batch is a dict whose arrays have different lengths, or that has none")

    def joined(names: list[str], places: Sequence[int], added: pa.Table) -> dict[str, Any]:
        taken = np.asarray(places, np.int64)
        out = {name: columns[name][taken] for name in names}
        for name in added.column_names:
            out[name] = added[name].combine_chunks().to_numpy(zero_copy_only=False)
        return out

    return _converted(counts.pop(), columns, joined)


def _pandas_rows(frame: Any) -> BatchRows:
    columns = {str(name): frame[name] for name in frame.columns}

    def joined(names: list[str], places: Sequence[int], added: pa.Table) -> Any:
        kept = frame[[name for name in frame.columns if str(name) in names]].iloc[list(places)]
        more = added.to_pandas()
        return kept.assign(**{name: more[name].to_numpy() for name in more.columns})

    return _converted(len(frame), columns, joined)


def _polars_rows(frame: Any) -> BatchRows:
    import polars

    def joined(names: list[str], places: Sequence[int], added: pa.Table) -> Any:
        return frame.select(names)[list(places)].hstack(polars.DataFrame(added).get_columns())

    table = frame.to_arrow()
    return BatchRows(frame.height, table.schema, table.select, joined)


def _converted(
    count: int, columns: dict[str, Any], joined: Callable[[list[str], Sequence[int], pa.Table], Any]
) -> BatchRows:
    """Rows of columns that are not Arrow's: each is converted alone, and refused only where it is used."""
    arrays: dict[str, pa.Array] = {}
    refused: dict[str, str] = {}
    for name, values in columns.items():
        try:
            several = getattr(values, "ndim", 1) > 1
            made = pa.array(list(values)) if several else pa.array(values, from_pandas=True)
            arrays[name] = made.combine_chunks() if isinstance(made, pa.ChunkedArray) else made
        except (pa.ArrowException, TypeError, ValueError) as error:
            refused[name] = str(error)
    schema = pa.schema(
        [pa.field(name, arrays[name].type if name in arrays else pa.null()) for name in columns]
    )

    def arrow(names: list[str]) -> pa.Table:
        for name in names:
            if name in refused:
                raise JobError(f"the batch's column {name} can't be made an Arrow array: {refused[name]}")
        return pa.table({name: arrays[name] for name in names})

    return BatchRows(count, schema, arrow, joined)
