"""Input files: what is found, planned and read, exactly and in bounded pieces."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import os
import uuid
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchinfer.connectors import jsonl
from batchinfer.connectors.csv import find_delimiter
from batchinfer.connectors.inputs import list_inputs, open_input
from batchinfer.connectors.readers import InputScan, discover, read_batches, read_split, scan_input
from batchinfer.connectors.storage import open_store
from batchinfer.connectors.types import BadRow, Row, Split, StorageError

TABLE = pa.table(
    {
        "id": pa.array(range(1000), pa.int64()),
        "text": pa.array([f"text {number} ü\n" * (number % 5) for number in range(1000)]),
        "tags": pa.array([["a", None, str(number)] if number % 3 else None for number in range(1000)]),
        "meta": pa.array(
            [{"page": number, "when": None} for number in range(1000)],
            pa.struct([("page", pa.int16()), ("when", pa.timestamp("us", "Europe/Zurich"))]),
        ),
        "at": pa.array([number * 1001 + 1 for number in range(1000)], pa.timestamp("ns", "UTC")),
        "price": pa.array([Decimal(f"{number}.25") for number in range(1000)], pa.decimal128(12, 2)),
        "raw": pa.array([b"\x00\xff%d" % number for number in range(1000)]),
        "kind": pa.array([f"kind {number % 4}" for number in range(1000)]).dictionary_encode(),
        "map": pa.array([[("k", number)] for number in range(1000)], pa.map_(pa.string(), pa.int32())),
    }
)


def scan(*uris: object, rows: int | None = None, format: Any = "auto") -> InputScan:
    return scan_input(discover([str(uri) for uri in uris], format), rows_per_split=rows)


def read(
    plan: InputScan, rows: int | None = None, columns: Sequence[str] | None = None
) -> list[Row | BadRow]:
    """All rows of the input, after checks of the splits' arithmetic."""
    found: list[Row | BadRow] = []
    for split in plan.splits(rows):
        assert split.first_row == len(found)
        found += read_split(split, plan.schema, columns)
        assert len(found) == split.first_row + split.rows
    assert [row.index for row in found] == list(range(plan.rows))
    return found


def values(rows: list[Row | BadRow]) -> list[dict[str, Any]]:
    assert all(isinstance(row, Row) for row in rows), [row for row in rows if isinstance(row, BadRow)]
    return [dict(row.values) for row in rows if isinstance(row, Row)]


def table(plan: InputScan, rows: int, columns: Sequence[str] | None = None) -> pa.Table:
    parts = [part for split in plan.splits(rows) for part in read_batches(split, plan.schema, columns)]
    assert not any(part.bad for part in parts)
    assert [index for part in parts for index in part.indices] == list(range(plan.rows))
    return pa.Table.from_batches([part.batch for part in parts])


def lines_file(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


# -- finding --------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "memory", "moto"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    match request.param:
        case "local":
            return str(tmp_path / "in put")
        case "memory":
            return f"memory://{uuid.uuid4().hex}/in put"
        case _:
            return request.getfixturevalue("s3_moto").uri + "/in put"


def test_files_folders_and_globs(root: str) -> None:
    store = open_store(root)
    keys = [
        "b.jsonl",
        "a.jsonl",
        "deep/er/c.jsonl.gz",
        "deep/d.ndjson",
        "_batchinfer/x.jsonl",
        "deep/_x/y.jsonl",
    ]
    keys += [".hidden.jsonl", "_SUCCESS", "notes.txt", "x[1].jsonl", "deep/.aside/z.jsonl"]
    for key in keys:
        store.put(key, key.encode())

    def names(*patterns: str) -> list[str]:
        return [
            file.uri.removeprefix(f"{store.root}/")
            for file in discover([f"{root}/{item}" for item in patterns])
        ]

    everything = ["a.jsonl", "b.jsonl", "deep/d.ndjson", "deep/er/c.jsonl.gz", "x[1].jsonl"]
    assert names("") == everything
    assert names("deep") == names("deep/") == ["deep/d.ndjson", "deep/er/c.jsonl.gz"]
    assert names("b.jsonl", "a.jsonl", "*.jsonl") == ["b.jsonl", "a.jsonl", "x[1].jsonl"]
    assert names("?.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names("[!a].jsonl") == ["b.jsonl"]
    assert names("[ab].jsonl") == ["a.jsonl", "b.jsonl"]
    assert names("**/*.jsonl") == ["a.jsonl", "b.jsonl", "x[1].jsonl"]
    assert names("**/*.gz") == ["deep/er/c.jsonl.gz"]
    assert names("deep/*/c.jsonl.gz") == ["deep/er/c.jsonl.gz"]
    assert names("x[1].jsonl") == ["x[1].jsonl"]
    (file,) = discover([f"{root}/a.jsonl"])
    assert (file.size, file.format, file.compression) == (7, "jsonl", "none")
    assert file.etag == store.head("a.jsonl").etag
    assert discover([f"{root}/deep/er"])[0].compression == "gzip"
    for nothing in ("nowhere", "*.csv", "a.jsonl/b"):
        with pytest.raises(StorageError, match="no file is there"):
            discover([f"{root}/{nothing}"])


def test_formats_by_name(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet")
    lines_file(tmp_path / "a.jsonl", {"a": 1})
    lines_file(tmp_path / "part-0", {"a": 1})
    lines_file(tmp_path / "sub.txt", {"a": 1})
    with pytest.raises(StorageError, match=r"mixes jsonl and parquet files; set input\.format"):
        discover([str(tmp_path)])
    assert [file.uri for file in discover([str(tmp_path)], "jsonl")] == [str(tmp_path / "a.jsonl")]
    with pytest.raises(StorageError, match=r"part-0: the name does not tell the format; set input\.format"):
        discover([str(tmp_path / "part-0")])
    assert discover([str(tmp_path / "part-*")], "jsonl")[0].format == "jsonl"
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "x.txt").touch()
    with pytest.raises(StorageError, match="none of its 1 files is an input file"):
        discover([str(tmp_path / "only")])
    with pytest.raises(StorageError, match="none of its 1 files is a csv file"):
        discover([str(tmp_path / "only")], "csv")


def test_a_relative_path_is_absolute_in_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines_file(tmp_path / "a.jsonl", {"a": 1})
    monkeypatch.chdir(tmp_path)
    assert discover(["a.jsonl"])[0].uri == str(tmp_path / "a.jsonl")
    assert discover([(tmp_path / "a.jsonl").as_uri()])[0].uri == str(tmp_path / "a.jsonl")


def test_an_open_object_reads_like_a_file(root: str) -> None:
    content = os.urandom(1000)
    open_store(root).put("object.bin", content)
    file, reference = open_input(f"{root}/object.bin"), io.BytesIO(content)
    for seek in [(0, 0), (10, 0), (-5, 2), (3, 1), (2000, 0), (-1000, 2)]:
        assert file.seek(*seek) == reference.seek(*seek)
        assert file.read(7) == reference.read(7)
        assert file.tell() == reference.tell()
    file.seek(0)
    assert io.BufferedReader(file, 16).read() == content
    assert list_inputs(f"{root}/object.bin")[0].size == 1000


# -- Parquet --------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_rows", [7, 100, 1000])
@pytest.mark.parametrize("rows", [1, 33, 250, 5000])
def test_parquet_passes_through_exactly(group_rows: int, rows: int, tmp_path: Path) -> None:
    if rows == 1 and group_rows == 1000:
        rows = 10
    pq.write_table(TABLE.slice(0, 600), tmp_path / "a.parquet", row_group_size=group_rows)
    pq.write_table(TABLE.slice(600), tmp_path / "b.parquet", row_group_size=group_rows)
    plan = scan(tmp_path)
    assert plan.schema.equals(TABLE.schema)
    splits = plan.splits(rows)
    assert max(split.rows for split in splits) <= rows
    assert sum(split.rows for split in splits) == 1000
    found = table(plan, rows)
    assert found.schema.equals(TABLE.schema)
    for name in TABLE.schema.names:
        assert (
            found[name].cast(TABLE[name].type).to_pylist() == TABLE[name].to_pylist()
            if name not in ("at", "kind")
            else pc.all(pc.equal(found[name].cast(pa.string()), TABLE[name].cast(pa.string()))).as_py()
        )


def test_parquet_row_groups_are_joined_or_cut(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet", row_group_size=100)
    plan = scan(tmp_path)

    def ranges(rows: int) -> list[tuple[int, int]]:
        return [(split.start, split.stop) for split in plan.splits(rows)]

    assert ranges(250) == [(0, 200), (200, 400), (400, 600), (600, 800), (800, 1000)]
    assert ranges(40)[:4] == [(0, 40), (40, 80), (80, 100), (100, 140)]
    assert ranges(1000) == [(0, 1000)]


def test_python_values_of_a_row(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet")
    row = read(scan(tmp_path), 1000)[1]
    assert isinstance(row, Row)
    assert set(row.values) == set(TABLE.schema.names)
    assert "nothing" not in row.values
    assert row.values["map"] == {"k": 1}
    assert row.values["tags"] == ["a", None, "1"]
    assert row.values["price"] == Decimal("1.25")
    assert row.values["at"] == datetime.datetime(1970, 1, 1, 0, 0, 0, 1, datetime.UTC)
    assert type(row.values["at"]) is datetime.datetime


class _Counted:
    """A store that notes the ranges read."""

    def __init__(self, store: Any) -> None:
        self.store, self.bytes, self.requests = store, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        data: bytes = self.store.get_range(key, start, stop)
        self.bytes += len(data)
        self.requests += 1
        return data


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[_Counted]:
    stores: list[_Counted] = []

    def open_counted(*arguments: Any) -> _Counted:
        stores.append(_Counted(open_store(*arguments)))
        return stores[-1]

    monkeypatch.setattr("batchinfer.connectors.inputs.open_store", open_counted)
    return stores


def test_only_what_is_needed_is_fetched(tmp_path: Path, counted: list[_Counted]) -> None:
    big = pa.array([os.urandom(20_000) for _ in range(1000)])
    pq.write_table(
        pa.table({"id": TABLE["id"], "text": TABLE["text"], "big": big}),
        tmp_path / "a.parquet",
        row_group_size=100,
    )
    plan = scan(tmp_path / "a.parquet")
    assert sum(store.bytes for store in counted) < 100_000, "planning reads footers only"
    counted.clear()
    assert len(list(read_split(plan.splits(100)[3], plan.schema, ["text", "id"]))) == 100
    assert sum(store.bytes for store in counted) < 100_000
    assert sum(store.requests for store in counted) < 8
    counted.clear()
    assert len(list(read_split(plan.splits(100)[3], plan.schema, ["big"]))) == 100
    assert 2_000_000 <= sum(store.bytes for store in counted) < 2_200_000


def test_a_large_row_group_is_streamed(
    tmp_path: Path, counted: list[_Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchinfer.connectors.parquet._FETCH_BYTES", 1 << 20)
    monkeypatch.setattr("batchinfer.connectors.parquet._BUFFER_BYTES", 1 << 20)
    big = pa.array([os.urandom(20_000) for _ in range(1000)])
    pq.write_table(
        pa.table({"big": big}),
        tmp_path / "a.parquet",
        compression=None,
        use_dictionary=False,
        write_batch_size=16,
    )
    plan = scan(tmp_path / "a.parquet")
    counted.clear()
    rows = read_split(plan.splits(1000)[0], plan.schema)
    first = next(rows)
    assert isinstance(first, Row)
    assert first.values["big"] == big[0].as_py()
    assert sum(store.bytes for store in counted) < 8 << 20, "not the whole row group at once"
    assert [row.values["big"] for row in rows if isinstance(row, Row)] == big.to_pylist()[1:]


def test_parquet_schemas_that_fit_are_joined(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"a": pa.array([1, 2], pa.int32()), "k": pa.array(["x", "y"]).dictionary_encode()}),
        tmp_path / "1.parquet",
    )
    pq.write_table(
        pa.table({"k": ["z"], "a": pa.array([2**40]), "b": ["only here"]}), tmp_path / "2.parquet"
    )
    plan = scan(tmp_path)
    assert plan.schema == pa.schema([("a", pa.int64()), ("k", pa.string()), ("b", pa.string())])
    assert values(read(plan, 10)) == [
        {"a": 1, "k": "x", "b": None},
        {"a": 2, "k": "y", "b": None},
        {"a": 2**40, "k": "z", "b": "only here"},
    ]
    pq.write_table(pa.table({"a": ["text"]}), tmp_path / "3.parquet")
    with pytest.raises(
        StorageError, match=r"3\.parquet: its columns don't fit.*\ba\b.*convert it"
    ) as caught:
        scan(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_value_that_cannot_be_cast_is_a_bad_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([1, 2**60 + 1, 3])}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"a": pa.array([0.5])}), tmp_path / "2.parquet")
    plan = scan(tmp_path)
    rows = read(plan, 10)
    assert [getattr(row, "code", None) for row in rows] == [None, "type_mismatch", None, None]
    assert isinstance(rows[1], BadRow)
    assert rows[1].message.startswith(f"{tmp_path}/1.parquet, row 1: ")


def test_an_unreadable_footer_is_named(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    for broken in (content[: len(content) // 2], b"", b"PAR1", content[:-50] + b"\xff" * 42 + content[-8:]):
        (tmp_path / "b.parquet").write_bytes(broken)
        with pytest.raises(StorageError, match=r"b\.parquet: the Parquet footer can't be read") as caught:
            scan(tmp_path)
        assert "\n" not in str(caught.value)


def test_rows_of_an_unreadable_row_group_are_bad(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(TABLE.select(["id", "text"]), path, row_group_size=100, compression="zstd")
    chunk = pq.read_metadata(path).row_group(4).column(1)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)
    plan = scan(path)
    rows = read(plan, 1000)
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert [row.index for row in bad] == list(range(400, 500))
    assert {row.code for row in bad} == {"unreadable"}
    assert bad[0].message.startswith(f"{path}, row group 4: ")
    assert [row.values["id"] for row in rows if isinstance(row, Row)] == [*range(400), *range(500, 1000)]
    assert len(values(read(plan, 1000, ["id"]))) == 1000, "the other columns are sound"
    part = [split for split in plan.splits(30) if 430 <= split.first_row < 460]
    assert {
        row.index for split in part for row in read_split(split, plan.schema) if isinstance(row, BadRow)
    } == {row for split in part for row in range(split.first_row, split.first_row + split.rows)}


def test_a_wide_schema_asks_for_one_name_once(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(StorageError, match=r"a\.parquet: the column a occurs more than once"):
        scan(tmp_path)


def test_no_columns_still_count_rows(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet")
    lines_file(tmp_path / "a.jsonl", {"a": 1}, {"a": 2})
    for name in ("a.parquet", "a.jsonl"):
        plan = scan(tmp_path / name)
        assert [dict(row.values) for row in read(plan, 2000, []) if isinstance(row, Row)] == [
            {}
        ] * plan.rows


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    plan = scan(lines_file(tmp_path / "a.jsonl", {"a": 1, "b": 2}))
    with pytest.raises(KeyError, match="no column c; the columns are a, b"):
        list(read_split(plan.splits(1)[0], plan.schema, ["c"]))


# -- JSON Lines -----------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.text(st.characters(codec="utf-8"), max_size=9)
)
JSON = st.recursive(
    SCALARS | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.sampled_from(["a", "b", "ü", "2020-01-01"]), JSON, max_size=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(rows=st.lists(OBJECTS, min_size=1, max_size=12), wanted=st.integers(1, 5))
def test_jsonl_rows_come_back(rows: list[dict[str, Any]], wanted: int, tmp_path: Path) -> None:
    path = lines_file(tmp_path / "a.jsonl", *rows)
    plan = scan(path, rows=wanted)
    assert plan.rows == len(rows)
    found = read(plan)
    assert [split.rows for split in plan.splits()][:-1] == [wanted] * (-(-len(rows) // wanted) - 1)
    for row, expected in zip(found, rows, strict=True):
        if isinstance(row, BadRow):
            assert row.code == "type_mismatch"
            assert json.loads(row.raw or "") == expected
        else:
            for name, value in row.values.items():
                assert_like(value, expected.get(name), plan.schema.field(name).type)


def assert_like(found: Any, expected: Any, kind: pa.DataType) -> None:
    """A value read is the JSON value, told in its column's type."""
    if found is None or expected is None:
        assert found is None
        assert expected is None
    elif pa.types.is_struct(kind):
        assert expected.keys() <= found.keys()
        for field in kind:
            assert_like(found[field.name], expected.get(field.name), field.type)
    elif pa.types.is_list(kind):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_like(one, other, kind.value_type)
    elif pa.types.is_string(kind) and not isinstance(expected, str):
        assert json.loads(found) == expected
    else:
        assert found == expected
        assert isinstance(found, bool) == isinstance(expected, bool)


@settings(deadline=None, max_examples=150)
@given(rows=st.lists(OBJECTS, min_size=1, max_size=8))
def test_the_fast_and_the_exact_inference_agree(rows: list[dict[str, Any]]) -> None:
    block = "".join(json.dumps(row) + "\n" for row in rows).encode()
    exact = jsonl.SchemaScan()
    exact.add(block)
    fast = jsonl.SchemaScan()
    fast._first = False  # the first lines always take the exact way
    fast.add(block)
    assert jsonl.schema_of(fast.kinds) == jsonl.schema_of(exact.kinds)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([1, None, 2], pa.int64()),
        ([1, 2.5], pa.float64()),
        ([2**63, 1], pa.float64()),
        (["2020-01-01", "2020-01-01T00:00:00Z"], pa.string()),
        (["x", 1, True], pa.string()),
        ([True, 1], pa.string()),
        ([None, None], pa.string()),
        ([[]], pa.list_(pa.string())),
        ([[1], [None, 2.5]], pa.list_(pa.float64())),
        ([{}], pa.string()),
        ([{"a": 1}, {"b": "x"}], pa.struct([("a", pa.int64()), ("b", pa.string())])),
        ([[{"role": "user"}], [{"role": "user"}], "x"], pa.list_(pa.struct([("role", pa.string())]))),
        ([1, 2, {"a": 1}], pa.int64()),
        ([{str(number): number} for number in range(300)], pa.string()),
    ],
)  # fmt: skip
def test_inferred_types(column: list[Any], expected: pa.DataType, tmp_path: Path) -> None:
    plan = scan(lines_file(tmp_path / "a.jsonl", *({"c": value} for value in column)))
    assert plan.schema == pa.schema([("c", expected)])


def test_bad_lines_are_kept_raw(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        b'\xef\xbb\xbf{"a": 1}',
        b"",
        b"not json",
        b"  \t\r",
        b'{"a": 2}\r',
        b'{"a": 3}{"a": 4}',
        b"[1]",
        b'{"a": "\xff"}',
        b"[" * 100_000,
        b'{"a": 5, "b": NaN}',
        b'{"a": 6, "t": "\\ud800"}',
        b'{"a": 7}',
    ]
    path.write_bytes(b"\n".join(lines))
    for granule in (1, 2, 100):
        plan = scan(path, rows=granule)
        rows = read(plan)
        assert plan.schema.names == ["a", "b", "t"]
        assert [row.values["a"] if isinstance(row, Row) else row.code for row in rows] == [
            1, "bad_line", 2, "bad_line", "bad_line", "bad_line", "bad_line", 5, "bad_line", 7,
        ]  # fmt: skip
        bad = [row for row in rows if isinstance(row, BadRow)]
        assert [row.message.split(": ")[0] for row in bad] == [
            f"{path}, line {n}" for n in (3, 6, 7, 8, 9, 11)
        ]
        assert [row.raw for row in bad[:4]] == ["not json", '{"a": 3}{"a": 4}', "[1]", '{"a": "\ufffd"}']
        assert all("\n" not in row.message and len(row.message) < 400 for row in bad)


def test_a_row_unlike_the_others_is_a_type_mismatch(tmp_path: Path) -> None:
    path = lines_file(tmp_path / "a.jsonl", {"m": [1]}, {"m": [2]}, {"m": "x" * 500}, {"m": None}, {})
    rows = read(scan(path), 64)
    assert [getattr(row, "code", "") for row in rows] == ["", "", "type_mismatch", "", ""]
    assert isinstance(rows[2], BadRow)
    assert rows[2].message.startswith(f"{path}, line 3: column m is ")
    assert "must be an array" in rows[2].message
    assert json.loads(rows[2].raw or "") == {"m": "x" * 500}


def test_mixed_scalars_become_text(tmp_path: Path) -> None:
    path = lines_file(tmp_path / "a.jsonl", {"m": "plain"}, {"m": 5}, {"m": True}, {"m": None}, {"m": 0.1})
    assert [row["m"] for row in values(read(scan(path), 64))] == ["plain", "5", "true", None, "0.1"]


@pytest.mark.parametrize("end", ["\n", ""])
def test_splits_of_lines_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr("batchinfer.connectors.lines.BLOCK_BYTES", 64)
    monkeypatch.setattr("batchinfer.connectors.readers.blocks_of_lines", _small_blocks)
    path = tmp_path / "a.jsonl"
    text = (
        "\n".join(json.dumps({"n": n, "t": "x" * (n % 50)}) + "\n" * (n % 7 == 0) for n in range(500)) + end
    )
    path.write_text(text)
    plan = scan(path)
    lines = {}
    for number, line in enumerate(text.split("\n"), 1):
        if line:
            lines[json.loads(line)["n"]] = number
    for split in plan.splits(128):
        assert split.unit == "bytes"
        assert split.first_line == lines[split.first_row]
    assert [row["n"] for row in values(read(plan, 128))] == list(range(500))


def _small_blocks(*arguments: Any, **named: Any) -> Any:
    from batchinfer.connectors.lines import blocks_of_lines

    return blocks_of_lines(*arguments, **(named | {"block_bytes": 64}))


def _two_members(data: bytes) -> bytes:
    middle = len(data) // 2
    return gzip.compress(data[:middle]) + gzip.compress(data[middle:])


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".gz", gzip.compress),
        (".gz", _two_members),
        (".zst", lambda data: pa.compress(data, "zstd", asbytes=True)),
    ],
)
def test_compressed_files(kind: str, suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    if kind == "jsonl":
        text = "".join(json.dumps({"n": n}) + "\n" for n in range(300)) + "bad\n"
    else:
        text = "n\n" + "".join(f"{n}\n" for n in range(300)) + "1,2\n"
    path = tmp_path / f"a.{kind}{suffix}"
    path.write_bytes(pack(text.encode()))
    whole = scan(path)
    assert [split.rows for split in whole.splits(64)] == [301], "one split a file"
    cut = scan(path, rows=100)
    assert [(split.unit, split.start, split.rows) for split in cut.splits()] == [
        ("rows", 0, 100), ("rows", 100, 100), ("rows", 200, 100), ("rows", 300, 1)]  # fmt: skip
    for plan in (whole, cut):
        rows = read(plan, 64 if plan is whole else None)
        assert [row.values["n"] for row in rows[:-1] if isinstance(row, Row)] == list(range(300))
        assert isinstance(rows[-1], BadRow)
        assert f"{path}, line {301 if kind == 'jsonl' else 302}: " in rows[-1].message
    path.write_bytes(pack(text.encode())[:-20])
    with pytest.raises(StorageError, match=f"{path.name}: the file can't be unpacked"):
        scan(path)
    path.write_bytes(text.encode())
    with pytest.raises(StorageError, match=f"{path.name}: the file can't be unpacked"):
        scan(path)


def test_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n \n")
    (tmp_path / "b.jsonl").touch()
    plan = scan(tmp_path)
    assert (plan.rows, plan.splits(10)) == (0, [])
    pq.write_table(TABLE.slice(0, 0), tmp_path / "c.parquet")
    assert scan(tmp_path / "c.parquet").splits(10) == []


def test_an_array_is_not_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n {"a": 1},\n {"a": 2}\n]')
    with pytest.raises(StorageError, match=r"a\.json: the file is one JSON array"):
        scan(tmp_path)


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchinfer.connectors.lines.LONGEST_LINE_BYTES", 1 << 20)
    (tmp_path / "a.jsonl").write_bytes(b"x" * (10 << 20))
    with pytest.raises(StorageError, match=r"a\.jsonl: a line has more than"):
        scan(tmp_path)


# -- CSV ------------------------------------------------------------------------------------------

FIELDS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=8) | st.sampled_from(
    ["", "a,b", 'say "x"', "two\nlines", "two\r\nlines", "7", "007", "-1.5", "true", "1e3", str(2**70)]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(
    rows=st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=12),
    wanted=st.integers(1, 5),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_csv_rows_come_back(rows: list[tuple[str, str]], wanted: int, end: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator=end)
        writer.writerow(["first", "second,\n"])
        writer.writerows(rows)
    plan = scan(path, rows=wanted)
    found = values(read(plan))
    for name, position in (("first", 0), ("second,\n", 1)):
        kind = plan.schema.field(name).type
        for row, expected in zip(found, rows, strict=True):
            text = expected[position]
            if pa.types.is_string(kind):
                assert row[name] == text
            elif not text:
                assert row[name] is None
            else:
                assert row[name] == {"int64": int, "double": float, "bool": lambda t: t.lower() == "true"}[
                    str(kind)
                ](text)


def test_csv_types_and_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b"\xef\xbb\xbfid,code,score,done,,long\n"
        b"1,007,1,true,x,\n"
        b'2,12,2.5,False,"y\ny",' + b"z" * 300_000 + b"\n"
        b"\n"
        b"3,1\n"
        b",,,,\xff,\n"
        b"4,,,,,,,\n"
        b"5,9,1e-3,true,,\n"
    )
    plan = scan(path, rows=1)
    assert plan.schema == pa.schema(
        [("id", pa.int64()), ("code", pa.string()), ("score", pa.float64()), ("done", pa.bool_()),
         ("column4", pa.string()), ("long", pa.string())]
    )  # fmt: skip
    rows = read(plan)
    assert [getattr(row, "code", "") for row in rows] == ["", "", "bad_line", "bad_line", "bad_line", ""]
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert [row.message.split(": ")[0] for row in bad] == [f"{path}, line {n}" for n in (6, 7, 8)]
    assert bad[0].raw == "3,1"
    assert "2 fields, but the header has 6" in bad[0].message
    assert bad[1].raw == ",,,,\ufffd,"
    assert values([row for row in rows if isinstance(row, Row)])[2] == {
        "id": 5, "code": "9", "score": 1e-3, "done": True, "column4": "", "long": ""}  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(
    rows=st.lists(st.tuples(FIELDS, FIELDS, FIELDS), min_size=1, max_size=12),
    delimiter=st.sampled_from(",;\t|"),
    wanted=st.integers(1, 5),
    packed=st.booleans(),
)
def test_what_separates_csv_fields_is_found(
    rows: list[tuple[str, str, str]], delimiter: str, wanted: int, packed: bool, tmp_path: Path
) -> None:
    """The same rows come back whatever separates their fields, by ranges or packed."""
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows([("one", "two", "three"), *rows])
    plain = io.StringIO(newline="")
    csv.writer(plain).writerows([("one", "two", "three"), *rows])
    (tmp_path / "plain.csv").write_bytes(plain.getvalue().encode())
    path = tmp_path / ("a.csv.gz" if packed else "a.csv")
    path.write_bytes(gzip.compress(text.getvalue().encode()) if packed else text.getvalue().encode())
    expected = scan(tmp_path / "plain.csv", rows=wanted)
    found = scan(path, rows=wanted)
    assert found.schema == expected.schema
    assert values(read(found)) == values(read(expected))
    path.unlink()


@pytest.mark.parametrize(
    ("text", "delimiter"),
    [
        ("id;text\n1;a, b\n2;c, d\n", ";"),
        ("id,text\n1,a; b\n2,c; d\n", ","),
        ("id\ttext, long\n1\ta\n2\tb, c, d\n", "\t"),
        ("id;note, long\n1;a\n2;b\n", ";"),
        ("a,b;c\n1,2;3\n", ","),
        ("question; answer\nwhat\nwho\nwhen\n", None),
        ("text\na, b\nc, d\n", None),
        ("id|text\n1|a\n2\n3|c\n", "|"),
        ('id;text\n1;"cut within quotes\n', ";"),
        ("", None),
    ],
)
def test_a_delimiter_is_what_gives_records_as_many_fields_as_the_header(
    text: str, delimiter: str | None
) -> None:
    assert find_delimiter(text.encode()) == delimiter


def test_a_delimiter_that_is_given_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b;c\n1,2;3\n")
    files = discover([str(tmp_path)])
    assert scan_input(files).schema.names == ["a", "b;c"]
    given = scan_input(files, delimiter=";")
    assert values(read(given, 64)) == [{"a,b": "1,2", "c": 3}]
    (tmp_path / "b.jsonl").write_text('{"a": 1}')
    with pytest.raises(StorageError, match=r"input\.delimiter is given, but .*b\.jsonl is read as jsonl"):
        scan_input(discover([str(tmp_path / "b.jsonl")]), delimiter=";")


def test_files_with_different_delimiters_are_both_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a;b\n1;2\n")
    (tmp_path / "b.csv").write_text("a,b\n1,2\n")
    (tmp_path / "c.csv").write_text("a\n1\n")
    with pytest.raises(StorageError, match=r"a\.csv separates its fields by ';', but .*b\.csv by ','"):
        scan(tmp_path)
    (tmp_path / "b.csv").unlink()
    assert values(read(scan(tmp_path), 64)) == [{"a": 1, "b": 2}, {"a": 1, "b": None}]


def test_csv_that_is_broken_is_not_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        "id,text\n1,Grüße\n".encode("latin-1") + b'2,"said "hi" to me"\n3,fine\n4,"never closed\n5,lost\n'
    )
    rows = read(scan(path), 64)
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert [row.message.removeprefix(f"{path}, ") for row in bad] == [
        "line 2: the line is not UTF-8; convert the file, such as with iconv -f WINDOWS-1252 -t UTF-8",
        "line 3: the line is not CSV (',' expected after '\"')",
        "line 5: a quoted field that begins here is never closed; close it, or double the quote",
    ]
    assert bad[2].raw == '4,"never closed\n5,lost'
    assert values([row for row in rows if isinstance(row, Row)]) == [{"id": 3, "text": "fine"}]


def test_csv_files_with_other_columns_in_another_order(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("a,b\n1,x\n")
    (tmp_path / "2.csv").write_text("b,a,c\ny,2.5,z\n")
    assert values(read(scan(tmp_path), 64)) == [
        {"a": 1.0, "b": "x", "c": None},
        {"a": 2.5, "b": "y", "c": "z"},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "no header line"),
        (b"a,b,a\n1,2,3\n", "names the column a more than once"),
        ("a,größe\n1,2\n".encode("latin-1"), "the header line is not UTF-8; .* iconv"),
        ("a,b\n1,2\n".encode("utf-16"), "the header line is not UTF-8; .* iconv -f UTF-16"),
    ],
)
def test_csv_headers(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(text)
    with pytest.raises(StorageError, match=rf"a\.csv: .*{message}"):
        scan(tmp_path)


# -- changes and failures --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv"])
def test_a_changed_or_missing_file_is_named(name: str, root: str) -> None:
    store = open_store(root)
    contents: list[bytes] = []
    for rows in (10, 11):
        sink = io.BytesIO()
        if name == "a.parquet":
            pq.write_table(TABLE.slice(0, rows), sink)
            contents.append(sink.getvalue())
        elif name == "a.jsonl":
            contents.append(b'{"id": 1}\n' * rows)
        else:
            contents.append(b"id\n" + b"1\n" * rows)
    store.put(name, contents[0])
    plan = scan(f"{root}/{name}")
    (split,) = plan.splits(64)
    assert len(list(read_split(split, plan.schema))) == 10
    store.put(name, contents[1])
    with pytest.raises(StorageError, match=f"{name}: the input file has changed since the job was planned"):
        list(read_split(split, plan.schema))
    store.delete(name)
    with pytest.raises(StorageError, match=f"{name}: the input file is gone since the job was planned"):
        list(read_split(split, plan.schema))


def test_a_file_changed_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = lines_file(tmp_path / "a.jsonl", *({"a": n} for n in range(5000)))
    plan = scan(path)
    (split,) = plan.splits(6400)
    rows = read_split(split, plan.schema)
    next(rows)
    lines_file(path, *({"a": n} for n in range(5001)))
    with pytest.raises(StorageError, match="changed since"):
        list(rows)


@pytest.mark.parametrize("reads", [0, 3])
@pytest.mark.parametrize(
    ("error", "message"),
    [(StorageError("the store failed"), "the store failed"), (FileNotFoundError("deleted"), "gone since")],
)
def test_a_failing_store_is_no_unreadable_row_group(
    error: Exception, message: str, reads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet", row_group_size=100)
    plan = scan(tmp_path)
    split = Split(plan.files[0].file, "rows", 0, 1000, 0, 1000)
    real = open_store

    class Failing(_Counted):
        def get_range(self, key: str, start: int, stop: int) -> bytes:
            if self.requests >= reads:
                raise error
            return super().get_range(key, start, stop)

    monkeypatch.setattr(
        "batchinfer.connectors.inputs.open_store", lambda *arguments: Failing(real(*arguments))
    )
    with pytest.raises(StorageError, match=message):
        list(read_split(split, plan.schema))
