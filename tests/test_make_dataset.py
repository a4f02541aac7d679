"""The demo's data set."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import make_dataset
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.connectors.readers import discover, read_split, scan_input
from batchinfer.connectors.types import Row


def test_the_data_set_is_the_same_each_time_and_in_both_formats(tmp_path: Path) -> None:
    first = make_dataset.write_dataset(tmp_path / "one")
    second = make_dataset.write_dataset(tmp_path / "two")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    rows = pa.concat_tables(pq.read_table(path) for path in first[:-1]).to_pylist()
    assert rows == [json.loads(line) for line in first[-1].read_text().splitlines()]
    assert len(rows) == len({row["id"] for row in rows}) >= 200
    instructions = Counter(row["instruction"] for row in rows)
    assert len(instructions) == len(make_dataset.TASKS)
    assert min(instructions.values()) >= 50
    assert min(map(len, instructions)) > 600
    assert all(240 <= row["characters"] == len(row["text"]) for row in rows)


def test_both_formats_read_alike(tmp_path: Path) -> None:
    make_dataset.write_dataset(tmp_path)
    found = []
    for folder in ("parquet", "jsonl"):
        scan = scan_input(discover([str(tmp_path / folder)]))
        rows = [row for split in scan.splits(64) for row in read_split(split, scan.schema)]
        found.append([(row.index, dict(row.values)) for row in rows if isinstance(row, Row)])
    assert found[0] == found[1]
    assert len(found[0]) == len(make_dataset.make_rows())
