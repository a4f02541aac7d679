"""The records that a job keeps in its folder, and how each is written as bytes."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa

from batchinfer.connectors.types import InputFile, Split
from batchinfer.jobs.history import Moment
from batchinfer.jobs.types import JobError, Shard

PROTOCOL = 1

ControlState = Literal["run", "cancel", "stop"]
WorkerState = Literal["starting", "running", "draining", "left", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """What a job is (job.json). Written once by submit; never changes.

    ``spec`` is the job spec as JSON values, ``schema`` the Arrow schema of the parts, ``input_schema``
    that of the input, by which every worker reads it. ``fingerprint`` names the model's content,
    ``plan`` the plan object by its name, ``shards`` and ``rows`` count what it holds, ``created`` is
    the submitter's time (ISO 8601, for people), ``nonce`` names the writer. ``slot_ns`` is the worker time
    of a slot of the budget.
    """

    spec: Mapping[str, Any]
    schema: pa.Schema
    input_schema: pa.Schema
    fingerprint: str
    plan: str
    shards: int
    rows: int
    created: str
    nonce: str
    slot_ns: int = 300_000_000_000

    def to_bytes(self) -> bytes:
        """The record as JSON; a schema is its Arrow IPC message in base64."""
        return _json(
            {
                "protocol": PROTOCOL,
                "spec": dict(self.spec),
                "schema": _schema_to_text(self.schema),
                "input_schema": _schema_to_text(self.input_schema),
                "fingerprint": self.fingerprint,
                "plan": self.plan,
                "shards": self.shards,
                "rows": self.rows,
                "created": self.created,
                "nonce": self.nonce,
                "slot_ns": self.slot_ns,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> JobRecord:
        """The inverse of :meth:`to_bytes`; raises JobError for a record of another protocol."""
        values = json.loads(data)
        protocol = values.pop("protocol", None)
        if protocol != PROTOCOL:
            raise JobError(
                f"job.json is of protocol {protocol}, but this batchinfer speaks protocol {PROTOCOL}: "
                "run it with the version that submitted the job"
            )
        schemas = {name: _schema_from_text(values.pop(name)) for name in ("schema", "input_schema")}
        return cls(**schemas, **values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """What a person last asked of the job (control/NNNN.json); None leaves the spec's value.

    ``placed`` holds the options of backends that later submits asked for workers, by backend;
    ``placing`` is the last submit's ``workers``, where they are not the spec's.
    ``failures`` are the failure limits that a later submit asked for. ``stop`` is the state of a job that
    has stopped itself, ``message`` why; a submit lets it run again. ``slot_ns`` is the worker time of
    a slot of the budget, where the job began without one.
    """

    state: ControlState = "run"
    workers: int | None = None
    usd_per_hour: float | None = None
    max_usd: float | None = None
    max_worker_hours: float | None = None
    placed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    placing: Mapping[str, Any] | None = None
    failures: Mapping[str, Any] | None = None
    slot_ns: int | None = None
    message: str = ""
    nonce: str = ""

    @property
    def limited(self) -> bool:
        """Whether a budget was asked for since the job began."""
        return self.max_usd is not None or self.max_worker_hours is not None

    def to_bytes(self) -> bytes:
        """The record as JSON."""
        return _json(asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> Control:
        """The inverse of :meth:`to_bytes`."""
        return cls(**json.loads(data))


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One generation of a shard's lease (claims/SHARD/NNNN.json), rewritten by its owner to renew it."""

    worker: str
    nonce: str
    released: bool = False

    def to_bytes(self) -> bytes:
        """The record as JSON."""
        return _json(asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> Claim:
        """The inverse of :meth:`to_bytes`."""
        return cls(**json.loads(data))


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedCount:
    """How many of a round's shards are committed (committed.json), as somebody counted ``at`` a time of the
    store's: as shards stay committed, there are no fewer now. Whoever counts rewrites it."""

    round: int
    committed: int
    at: float

    def to_bytes(self) -> bytes:
        """The record as JSON."""
        return _json(asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> CommittedCount:
        """The inverse of :meth:`to_bytes`; raises ValueError for what it has not written."""
        values = json.loads(data)
        if not isinstance(values, dict) or any(
            type(number) not in (int, float) for number in values.values()
        ):
            raise ValueError("this is no count of committed shards")
        try:
            return cls(**values)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"this is no count of committed shards: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A bought slot of the budget (budget/NNNNNN.json): who bought it."""

    worker: str
    nonce: str

    def to_bytes(self) -> bytes:
        """The record as JSON."""
        return _json(asdict(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class SettledSlot:
    """What was spent of a bought slot (budget/NNNNNN.settled.json), in worker time and USD."""

    spent_ns: int
    spent_usd: float
    nonce: str

    def to_bytes(self) -> bytes:
        """The record as JSON."""
        return _json(asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> SettledSlot:
        """The inverse of :meth:`to_bytes`."""
        return cls(**json.loads(data))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """Where a worker's time went since its process started, in nanoseconds.

    ``rows`` is charged to rows, finished or in flight; ``waste`` was spent on tokens computed again or
    rows that somebody else finished; ``storage`` waits for reads and writes with nothing to compute;
    ``idle`` is everything else after ``startup``. The buckets add up to ``total``, exactly.
    """

    startup: int = 0
    rows: int = 0
    idle: int = 0
    storage: int = 0
    waste: int = 0

    @property
    def total(self) -> int:
        """The worker's whole bill in nanoseconds."""
        return self.startup + self.rows + self.idle + self.storage + self.waste


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """A worker's heartbeat (workers/ID.json), rewritten by its owner alone.

    ``beat`` counts the rewrites. ``usd_per_hour`` is its price, ``bill`` its time by bucket up to this
    heartbeat. ``rows_done`` counts rows it finished, ``prompt_tokens`` and ``completion_tokens`` their
    tokens, ``history`` the same at earlier moments. ``exit_code`` and ``message`` are set when it leaves.
    ``index`` is the batch service's; ``bought`` says whether its time is bought as slots of a budget.
    """

    worker: str
    state: WorkerState
    beat: int
    usd_per_hour: float | None
    bill: Bill
    started: str
    host: str = ""
    pid: int = 0
    index: int | None = None
    bought: bool = False
    rows_done: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    exit_code: int | None = None
    message: str = ""
    history: tuple[Moment, ...] = ()

    def to_bytes(self) -> bytes:
        """The record as JSON."""
        return _json(asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> WorkerRecord:
        """The inverse of :meth:`to_bytes`."""
        values = json.loads(data)
        history = tuple(Moment(*moment) for moment in values.pop("history"))
        return cls(bill=Bill(**values.pop("bill")), history=history, **values)


_PLAN_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("estimated_tokens", pa.int64()),
        ("uri", pa.dictionary(pa.int32(), pa.string())),
        ("size", pa.int64()),
        ("etag", pa.dictionary(pa.int32(), pa.string())),
        ("format", pa.dictionary(pa.int32(), pa.string())),
        ("compression", pa.dictionary(pa.int32(), pa.string())),
        ("unit", pa.dictionary(pa.int32(), pa.string())),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("first_row", pa.int64()),
        ("rows", pa.int64()),
        ("first_line", pa.int64()),
    ]
)


def _schema_to_text(schema: pa.Schema) -> str:
    return base64.b64encode(schema.serialize().to_pybytes()).decode("ascii")


def _schema_from_text(text: str) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


def plan_to_bytes(shards: Sequence[Shard]) -> bytes:
    """A plan as an Arrow IPC file, one row a split; equal plans give equal bytes."""
    columns: dict[str, list[Any]] = {name: [] for name in _PLAN_SCHEMA.names}
    for shard in shards:
        for split in shard.splits:
            columns["shard"].append(shard.index)
            columns["estimated_tokens"].append(shard.estimated_tokens)
            for name in ("uri", "size", "etag", "format", "compression"):
                columns[name].append(getattr(split.file, name))
            for name in ("unit", "start", "stop", "first_row", "rows", "first_line"):
                columns[name].append(getattr(split, name))
    arrays = []
    for column in _PLAN_SCHEMA:
        if pa.types.is_dictionary(column.type):
            arrays.append(pa.array(columns[column.name], column.type.value_type).dictionary_encode())
        else:
            arrays.append(pa.array(columns[column.name], column.type))
    return table_to_bytes(pa.Table.from_arrays(arrays, schema=_PLAN_SCHEMA))


def plan_from_bytes(data: bytes) -> list[Shard]:
    """The inverse of :func:`plan_to_bytes`."""
    files: dict[tuple[Any, ...], InputFile] = {}
    shards: list[Shard] = []
    splits: list[Split] = []
    current, tokens = -1, 0
    for row in zip(*table_from_bytes(data).to_pydict().values(), strict=True):
        index, estimated, uri, size, etag, format_, compression, unit, start, stop, first, rows, line = row
        if index != current and splits:
            shards.append(Shard(current, tuple(splits), tokens))
            splits = []
        current, tokens = index, estimated
        key = (uri, size, etag, format_, compression)
        file = files.setdefault(key, InputFile(*key))
        splits.append(Split(file, unit, start, stop, first, rows, line))
    if splits:
        shards.append(Shard(current, tuple(splits), tokens))
    return shards


def plan_digest(data: bytes) -> str:
    """The digest by which a plan is named: 16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


FAILURES_SCHEMA = pa.schema(
    [
        ("row_index", pa.int64()),
        ("code", pa.string()),
        ("message", pa.string()),
        ("attempts", pa.int32()),
        ("input", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Failure:
    """A row that can't be answered: why, after how many attempts, and its input: the raw text of a row
    that can't be read, else its values as JSON."""

    row_index: int
    code: str
    message: str
    attempts: int = 1
    input: str | None = None


def input_as_json(values: Mapping[str, Any]) -> str:
    """A row's values as JSON for people; what JSON has no form for is written as text."""
    return json.dumps(dict(values), ensure_ascii=False, default=str)


def failures_to_bytes(failures: Sequence[Failure], nonce: str) -> bytes:
    """Failures as an Arrow IPC file that carries its writer's nonce."""
    table = pa.Table.from_pylist([asdict(failure) for failure in failures], schema=FAILURES_SCHEMA)
    return table_to_bytes(table.replace_schema_metadata({"nonce": nonce}))


def failures_from_bytes(data: bytes) -> list[Failure]:
    """The inverse of :func:`failures_to_bytes`."""
    return [Failure(**row) for row in table_from_bytes(data).to_pylist()]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFooter:
    """What a part's Parquet footer says about its commit, under the key ``batchinfer``.

    ``failures`` is the nonce of the failures object that counts, or None; ``rows`` counts the part's
    rows, ``failed_rows`` those of the failures object, ``codes`` the same by code, ``retried_rows`` those
    that had failed before: all of a retry round's. ``nanoseconds`` is what each worker charged to the
    part's rows. Tokens, nanoseconds and USD (0 where no price is known) are summed over the rows.
    """

    nonce: str
    worker: str
    rows: int
    failed_rows: int = 0
    retried_rows: int = 0
    failures: str | None = None
    codes: Mapping[str, int] = field(default_factory=dict)
    nanoseconds: Mapping[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prefill_ns: int = 0
    decode_ns: int = 0
    prefill_usd: float = 0.0
    decode_usd: float = 0.0

    def to_bytes(self) -> bytes:
        """The value of the footer's key, as JSON."""
        return _json(asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> PartFooter:
        """The inverse of :meth:`to_bytes`."""
        return cls(**json.loads(data))


def nonce_of(data: bytes) -> str | None:
    """The writer's nonce in a JSON record; None where there is none."""
    value = json.loads(data).get("nonce")
    return value if isinstance(value, str) else None


def table_to_bytes(table: pa.Table) -> bytes:
    """A table as an Arrow IPC file, compressed."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def table_from_bytes(data: bytes) -> pa.Table:
    """The inverse of :func:`table_to_bytes`."""
    return pa.ipc.open_file(pa.BufferReader(data)).read_all()


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8")
