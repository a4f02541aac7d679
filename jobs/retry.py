"""Which rows of a job have failed for now, and the round that tries them again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from batchinfer.jobs.folder import JobFolder, ShardName, new_nonce
from batchinfer.jobs.parallel import read_all
from batchinfer.jobs.records import Failure, JobRecord
from batchinfer.jobs.rounds import FailedRow, RoundPlan, cut_round, shards_of
from batchinfer.jobs.types import JobError, Shard

# Codes of rows that would fail again as they did: their input or the job is what is wrong.
PERMANENT = frozenset(
    {
        "bad_line",
        "unreadable",
        "bad_request",
        "type_mismatch",
        "render_error",
        "chat_template",
        "empty_prompt",
        "bad_token",
        "too_long",
    }
)
FEWEST_ROWS = 16
SHARDS_PER_WORKER = 4


def round_names(number: int, shards: int) -> list[ShardName]:
    """The names of a round's shards; round 0 is the job's own plan."""
    return [ShardName(number, index, shards) for index in range(shards)]


def round_shards(folder: JobFolder, first: Sequence[Shard], number: int) -> Mapping[ShardName, Shard]:
    """The shards of a retry round of the job whose own plan is ``first``; none where it was not begun."""
    plan = folder.read_round(number)
    if plan is None:
        return {}
    shards = shards_of(plan, first)
    return dict(zip(round_names(number, len(shards)), shards, strict=True))


def last_round(folder: JobFolder, first: Sequence[Shard]) -> Mapping[ShardName, Shard]:
    """The shards of the last round that was begun. A round is begun when those before it are complete, so
    this is all that there may be to do."""
    numbers = folder.list_rounds()
    if numbers:
        return round_shards(folder, first, numbers[-1])
    return dict(zip(round_names(0, len(first)), first, strict=True))


def job_shards(record: JobRecord, rounds: Mapping[int, RoundPlan]) -> list[ShardName]:
    """Every shard of a job, those of its retry rounds included."""
    names = round_names(0, record.shards)
    for number in sorted(rounds):
        names += round_names(number, len(rounds[number].shards))
    return names


def read_rounds(folder: JobFolder, known: Mapping[int, RoundPlan] | None = None) -> dict[int, RoundPlan]:
    """The plans of all retry rounds; those ``known`` are not read again."""
    rounds = dict(known or {})
    for number in folder.list_rounds():
        if number not in rounds:
            plan = folder.read_round(number)
            assert plan is not None
            rounds[number] = plan
    return rounds


def is_complete(folder: JobFolder, record: JobRecord) -> bool:
    """Whether every shard of every round is committed."""
    rounds = read_rounds(folder)
    return folder.committed().keys() >= set(job_shards(record, rounds))


def current_failures(folder: JobFolder) -> dict[int, tuple[ShardName, Failure]]:
    """The failed rows of committed parts that no later round has answered, in the order of the input,
    each with the shard that failed it last."""
    parts = sorted(folder.committed())
    rounds = read_rounds(folder)

    def failures(shard: ShardName) -> list[Failure]:
        nonce = folder.read_footer(shard).failures
        return [] if nonce is None else folder.read_failures(shard, nonce)

    current: dict[int, tuple[ShardName, Failure]] = {}
    for shard, failed in read_all(folder.clock, failures, parts).items():
        if shard.round:
            for row in rounds[shard.round].shards[shard.index]:
                current.pop(row.row_index, None)
        current.update({failure.row_index: (shard, failure) for failure in failed})
    return dict(sorted(current.items()))


def failures_in_order(folder: JobFolder) -> Iterator[Failure]:
    """The failures of :func:`current_failures`, those of one part in memory at a time, or of the whole job
    where it has retry rounds."""
    parts = sorted(folder.committed())
    if any(shard.round for shard in parts):
        yield from (failure for _, failure in current_failures(folder).values())
        return
    for shard in parts:
        nonce = folder.read_footer(shard).failures
        if nonce is not None:
            yield from folder.read_failures(shard, nonce)


def begin_round(
    folder: JobFolder, record: JobRecord, codes: Collection[str] = (), workers: int = 1
) -> tuple[int, RoundPlan]:
    """Begin the next retry round, of the current failures with these ``codes``; returns its number and
    its plan. Without codes it tries every row whose failure may pass.

    Raises JobError where the job is not complete, nothing has failed in such a way, or somebody else
    begins the round at the same time.
    """
    rounds = read_rounds(folder)
    if not folder.committed().keys() >= set(job_shards(record, rounds)):
        raise JobError(
            f"the job at {folder.uri} is not complete, and a retry begins when it is: submit it again to "
            "go on, or wait for its workers"
        )
    failed = current_failures(folder)
    chosen = _chosen(folder.uri, failed, codes)
    planned = max(shard.rows for shard in folder.read_plan(record.plan))
    rows = min(planned, max(FEWEST_ROWS, -(-len(chosen) // (SHARDS_PER_WORKER * workers))))
    plan = cut_round(chosen, rows, new_nonce())
    number = max(rounds, default=0) + 1
    if not folder.create_round(number, plan):
        raise JobError(
            f"somebody else has just begun retry round {number} of the job at {folder.uri}: wait for it, "
            "then retry what is left"
        )
    return number, plan


def _chosen(
    uri: str, failed: Mapping[int, tuple[ShardName, Failure]], codes: Collection[str]
) -> list[FailedRow]:
    """References to the failures to try again."""
    counts = Counter(failure.code for _, failure in failed.values())
    found = ", ".join(f"{code} {count:,}" for code, count in sorted(counts.items()))
    if not failed:
        raise JobError(f"no row of the job at {uri} has failed: there is nothing to retry")
    for code in codes:
        if code not in counts:
            raise JobError(
                f"no row of the job at {uri} has failed with the code {code}: those that have are {found}"
            )
    wanted = set(codes) or counts.keys() - PERMANENT
    if not wanted:
        raise JobError(
            f"all failures of the job at {uri} would come again ({found}): correct the input or the spec "
            "under another output.uri, or name the codes to retry with --code"
        )
    return [
        FailedRow(row, shard.part, failure.attempts, failure.code)
        for row, (shard, failure) in failed.items()
        if failure.code in wanted
    ]
