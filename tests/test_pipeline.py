"""Batches of every kind through the columns and prompts of jobs, in order, with failures beside answers."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from fake_engine import fake_engine, text_of
from hypothesis import given
from hypothesis import strategies as st

import batchinfer
from batchinfer.engine.config import EngineConfig
from batchinfer.engine.types import SamplingParams
from batchinfer.jobs import pipeline
from batchinfer.jobs.columns import added_columns
from batchinfer.jobs.pipeline import MapBatches
from batchinfer.jobs.types import JobError

LONG = "too long"  # what the played engine rejects
WINDOW = 20


class PlayedEngine:
    """The engine of the jobs' tests, which also remembers how many rows it had at once."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._engine = fake_engine(config)
        self.most = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self) -> Any:
        self.most = max(self.most, len(self._engine._waiting) + len(self._engine._running))
        return self._engine.step()


@pytest.fixture(autouse=True)
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[PlayedEngine]]:
    made: list[PlayedEngine] = []

    def load(**settings: Any) -> PlayedEngine:
        made.append(PlayedEngine(EngineConfig(**{**settings, "window": WINDOW})))
        return made[-1]

    monkeypatch.setattr(pipeline, "Engine", load)
    monkeypatch.setattr(pipeline, "local_model", lambda source, storage: source)
    monkeypatch.setattr(pipeline, "_ENGINES", {})
    yield made


def table(rows: int, first: int = 0) -> pa.Table:
    return pa.table(
        {
            "id": pa.array(range(first, first + rows), pa.int16()),
            "text": [f"text {row}" for row in range(first, first + rows)],
        }
    )


KINDS = {
    "table": lambda rows: rows,
    "batch": lambda rows: rows.combine_chunks().to_batches()[0],
    "dict": lambda rows: {name: rows[name].to_numpy(zero_copy_only=False) for name in rows.column_names},
    "pandas": lambda rows: rows.to_pandas(),
    "polars": lambda rows: pl.from_arrow(rows),
}
TYPES = {
    "table": pa.Table,
    "batch": pa.RecordBatch,
    "dict": dict,
    "pandas": pd.DataFrame,
    "polars": pl.DataFrame,
}


def as_rows(batch: Any) -> list[dict[str, Any]]:
    if isinstance(batch, dict):
        batch = pd.DataFrame({name: list(values) for name, values in batch.items()})
    if isinstance(batch, pd.DataFrame):
        return [
            {
                name: None if not isinstance(value, list) and pd.isna(value) else value
                for name, value in row.items()
            }
            for row in batch.to_dict("records")
        ]
    return list(batch.to_dicts() if isinstance(batch, pl.DataFrame) else batch.to_pylist())


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_comes_back_as_what_it_is_with_the_columns_of_a_job(kind: str) -> None:
    answer = MapBatches("m", prompt="{{ text }}", usd_per_hour=3.6)
    rows = table(7).set_column(1, "text", [[LONG if row == 3 else f"text {row}" for row in range(7)]])
    batch = KINDS[kind](rows)
    out = answer(batch)
    assert type(out) is TYPES[kind]
    found = as_rows(out)
    names = ["id", "text", *added_columns(SamplingParams(), False).names, "error_code", "error_message"]
    assert [list(row) for row in found] == [names] * 7
    assert [row["id"] for row in found] == [row["row_index"] for row in found] == list(range(7))
    assert [row["completion"] for row in found] == [
        None if row == 3 else text_of(row, 0) for row in range(7)
    ]
    failed = found.pop(3)
    assert (failed["error_code"], failed["error_message"]) == ("too_long", "the prompt is too long")
    assert (failed["completion_tokens"], failed["seconds"], failed["cost_usd"]) == (0, 0, None)
    for row in found:
        assert row["error_code"] is None and row["finish_reason"] == "stop"
        assert row["cost_usd"] == pytest.approx(row["seconds"] * 3.6 / 3600)
    if isinstance(out, pa.Table | pa.RecordBatch):
        assert out.schema.field("id").type == pa.int16(), "columns keep their types"
    if isinstance(out, dict):
        assert out["id"].dtype == np.int16 and out["prompt_tokens"].dtype == np.int32


@given(
    sizes=st.lists(st.integers(0, 30), max_size=6),
    bad=st.sets(st.integers(0, 100)),
    samples=st.integers(1, 3),
    kind=st.sampled_from(["table", "pandas"]),
)
def test_streams_keep_order_rows_and_bounds(
    sizes: list[int], bad: set[int], samples: int, kind: str
) -> None:
    pipeline._ENGINES.clear()
    read = 0
    given_out = 0

    def source() -> Iterator[Any]:
        nonlocal read
        first = 0
        for size in sizes:
            rows = table(size, first)
            texts = [LONG if row in bad else f"text {row}" for row in range(first, first + size)]
            first += size
            read += 1
            assert sum(sizes[given_out : read - 1]) < WINDOW, "no more is read than the window holds"
            yield KINDS[kind](rows.set_column(1, "text", pa.array(texts, pa.string())))

    answer = MapBatches("m", prompt="{{ text }}", sampling={"n": samples})
    found = []
    for batch, size in zip(answer.stream(source()), sizes, strict=True):
        given_out += 1
        rows = as_rows(batch)
        assert len({row["id"] for row in rows}) == size
        found += rows
    expected = []
    for row in range(sum(sizes)):
        for sample in range(1 if row in bad else samples):
            expected.append((row, sample, None if row in bad else text_of(row, sample)))
    assert [(row["row_index"], row.get("sample_index", 0), row["completion"]) for row in found] == expected
    [engine] = pipeline._ENGINES.values()
    assert not engine.has_work


def test_a_stream_that_is_left_leaves_nothing_and_two_at_once_are_refused(
    engines: list[PlayedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TOKENS", "13")
    answer = MapBatches("m", prompt="{{ text }}")
    stream = answer.stream(table(5, first) for first in range(0, 500, 5))
    next(stream)
    assert engines[0].has_work
    with pytest.raises(RuntimeError, match="busy with another stream"):
        answer(table(1))
    stream.close()
    assert not engines[0].has_work
    assert answer(table(1)).num_rows == 1


def test_a_model_is_loaded_once_a_process(engines: list[PlayedEngine]) -> None:
    answer = MapBatches({"source": "m", "max_context": 64}, prompt="{{ text }}")
    assert not engines, "it is loaded with the first batch"
    answer(table(2))
    copy = pickle.loads(pickle.dumps(answer))
    assert copy(table(2)).num_rows == 2
    assert len(engines) == 1
    assert (engines[0].config.max_context, engines[0].config.dtype) == (64, "bf16")
    MapBatches("other", prompt="{{ text }}")(table(1))
    assert len(engines) == 2


def test_rows_go_by_their_own_positions_where_a_column_has_them() -> None:
    answer = MapBatches("m", prompt="{{ text }}", index_column="id", columns=["id"])
    out = answer(table(4).take([3, 0, 2]))
    assert out["id"].to_pylist() == out["row_index"].to_pylist() == [3, 0, 2]
    assert out["completion"].to_pylist() == [text_of(row, 0) for row in (3, 0, 2)]
    assert "text" not in out.column_names
    with pytest.raises(JobError, match="index_column id holds 1 more than once"):
        answer(table(4).take([1, 1]))
    assert answer(table(1)).num_rows == 1, "it goes on"
    with pytest.raises(JobError, match="index_column text must hold an integer"):
        MapBatches("m", prompt="{{ text }}", index_column="text")(table(1))


def test_a_row_whose_prompt_can_not_be_made_has_its_error() -> None:
    rows = pa.table({"chat": ['[{"role": "user", "content": "hi"}]', "nonsense", None]})
    out = MapBatches("m", messages_column="chat")(rows)
    assert out["error_code"].to_pylist() == [None, "render_error", "render_error"]
    assert "not valid JSON" in out["error_message"][1].as_py()


REFUSED: list[tuple[dict[str, Any], Any, str]] = [
    (
        {"prompt": "{{ text }}", "sampling": {"max_tokens": 0}},
        None,
        "map_batches: sampling.max_tokens is 0",
    ),
    ({}, None, "map_batches: .*exactly one of prompt, messages"),
    ({"prompt": "{{ nothing }}"}, table(1), "names the column nothing, .* its columns are id, text"),
    ({"prompt": "x", "columns": ["nothing"]}, table(1), "columns names nothing, .*columns are id, text"),
    ({"prompt": "x"}, pa.table({"completion": ["x"]}), "column completion would collide"),
    ({"prompt": "x"}, pa.table({"error_code": ["x"]}), "column error_code would collide"),
    ({"prompt": "x"}, [1, 2], "the batch is a builtins.list, but it must be"),
    ({"prompt": "x"}, {"a": [1, 2], "b": [1]}, "arrays have different lengths"),
    ({"prompt": "{{ o }}"}, {"o": [object()], "a": [1]}, "column o can't be made an Arrow array"),
]


@pytest.mark.parametrize(("settings", "batch", "message"), REFUSED)
def test_what_a_job_would_be_refused_for_is_refused(
    settings: dict[str, Any], batch: Any, message: str
) -> None:
    with pytest.raises(JobError, match=message):
        answer = MapBatches("m", **settings)
        answer(batch)


def test_columns_that_are_not_used_may_be_of_any_type() -> None:
    class Picture:
        pass

    given_in = {
        "text": np.array(["a", "b"]),
        "picture": np.array([Picture(), Picture()]),
        "x": np.ones((2, 3)),
    }
    out = MapBatches("m", prompt="{{ text }}", sampling=SamplingParams(n=2))(given_in)
    assert list(out["sample_index"]) == [0, 1, 0, 1]
    assert out["picture"][1] is given_in["picture"][0] and out["x"].shape == (4, 3)


def test_the_front_door_has_it() -> None:
    assert batchinfer.map_batches is batchinfer.MapBatches is MapBatches
