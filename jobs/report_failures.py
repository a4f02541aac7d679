"""Failed rows as examples: a few of each code, from as few of the failures objects as will do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.records import PartFooter
from batchinfer.jobs.rounds import RoundPlan

EXAMPLES = 3
# Failures objects that are read at most: they hold the input of every failed row.
OBJECTS = 48
_TEXT = 400


@dataclass(frozen=True, slots=True)
class Example:
    """A failed row: its position in the input, why it failed, after how many attempts, and the beginning
    of its input."""

    row_index: int
    message: str
    attempts: int
    input: str


@dataclass(frozen=True, slots=True)
class FailureKind:
    """The rows that failed with one code: how many, and examples of them."""

    code: str
    count: int
    examples: tuple[Example, ...]


def failure_kinds(
    folder: JobFolder,
    counts: Mapping[str, int],
    footers: Mapping[ShardName, PartFooter],
    rounds: Mapping[int, RoundPlan],
) -> tuple[FailureKind, ...]:
    """The failures of a job by code, the most frequent first, with examples from committed parts.

    ``counts`` are those for now; ``rounds`` the plans of retry rounds, whose rows are examples of the
    last round that failed them alone.
    """
    found: dict[str, list[Example]] = {code: [] for code in counts}
    tried = _tried_again(footers, rounds)
    read = 0
    # The latest rounds first, since what they tried is not failed as it was before.
    for shard in sorted(footers, key=lambda shard: (-shard.round, shard.index)):
        footer = footers[shard]
        wanted = [code for code in footer.codes if len(found.get(code, [0] * EXAMPLES)) < EXAMPLES]
        if not wanted or footer.failures is None:
            continue
        if read == OBJECTS:
            break
        read += 1
        later = tried.get(shard.part, set())
        for failure in folder.read_failures(shard, footer.failures):
            examples = found.get(failure.code)
            if examples is not None and len(examples) < EXAMPLES and failure.row_index not in later:
                examples.append(
                    Example(
                        failure.row_index,
                        shortened(failure.message),
                        failure.attempts,
                        shortened(failure.input or ""),
                    )
                )
    kinds = [FailureKind(code, count, tuple(found[code])) for code, count in counts.items()]
    return tuple(sorted(kinds, key=lambda kind: (-kind.count, kind.code)))


def _tried_again(
    footers: Mapping[ShardName, PartFooter], rounds: Mapping[int, RoundPlan]
) -> dict[str, set[int]]:
    """The failed rows of each part that a committed shard of a later round has tried again."""
    tried: dict[str, set[int]] = {}
    for number, plan in rounds.items():
        for index, rows in enumerate(plan.shards):
            if ShardName(number, index, len(plan.shards)) in footers:
                for row in rows:
                    tried.setdefault(row.part, set()).add(row.row_index)
    return tried


def shortened(text: str) -> str:
    """The beginning of a text, with a mark where it goes on."""
    return text if len(text) <= _TEXT else f"{text[:_TEXT]}…"
