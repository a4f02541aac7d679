"""The failure limit: a job in which too many rows fail stops, before it has spent more on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.progress import Progress, read_progress
from batchinfer.jobs.records import Failure, PartFooter
from batchinfer.jobs.types import Shard

FIRST_ROWS = 50


class JobStopped(Exception):
    """The job has stopped itself: one sentence that says why and what to do. Exit 77."""


@dataclass(frozen=True, slots=True)
class FailureLimit:
    """At most ``max_share`` of the rows may fail, once ``after_rows`` have been seen; 1 is no limit."""

    max_share: float = 1.0
    after_rows: int = 1

    def broken_by(self, failed: int, seen: int) -> bool:
        """Whether ``failed`` of the first ``seen`` rows are too many; all of the first 50 always are."""
        if self.max_share >= 1.0:
            return False
        first_all_fail = failed == seen >= FIRST_ROWS
        return first_all_fail or (seen >= self.after_rows and failed > self.max_share * seen)


NO_LIMIT = FailureLimit()


class FailureCount:
    """Counts the rows of a job that are seen and failed, over committed parts and saved progress.

    Many failures are known as soon as a row is read, long before its neighbours are answered. So in an
    open shard the rows up to the last one that is settled count as seen, whether they are settled or
    not: a share of failing rows looks the same early and late. Of a retry round's rows nothing is
    counted: they have failed before.
    """

    def __init__(self, folder: JobFolder, shards: Mapping[ShardName, Shard], n: int) -> None:
        self._folder = folder
        self._shards = {name: shard for name, shard in shards.items() if name.round == 0}
        self._n = n
        self._footers: dict[ShardName, PartFooter] = {}

    def reason_to_stop(self, limit: FailureLimit) -> str | None:
        """Why the job must stop by ``limit``, as one sentence; None where it need not, or where all of
        it is committed."""
        seen, failures = self._count()
        if len(self._footers) == len(self._shards):
            return None
        failed = len(failures) + sum(footer.failed_rows for footer in self._footers.values())
        if not limit.broken_by(failed, seen):
            return None
        for shard, footer in self._footers.items():
            if footer.failures is not None:
                failures += self._folder.read_failures(shard, footer.failures)
        [(code, _)] = Counter(failure.code for failure in failures).most_common(1)
        example = next(failure for failure in failures if failure.code == code)
        return (
            f"{failed:,} of the first {seen:,} rows have failed, which is {failed / seen:.1%} and more "
            f"than failures.max_share allows ({limit.max_share:.1%}): most of them with {code}, such as "
            f"row {example.row_index} ({example.message}); submit again with a higher failures.max_share "
            "to go on all the same"
        )

    def _count(self) -> tuple[int, list[Failure]]:
        """Rows seen, and the failures of open shards."""
        seen = 0
        failures: list[Failure] = []
        committed = self._folder.committed()
        claimed = self._folder.list_claims()
        for name, shard in self._shards.items():
            if name in committed:
                if name not in self._footers:
                    self._footers[name] = self._folder.read_footer(name)
                footer = self._footers[name]
                seen += footer.rows // self._n + footer.failed_rows
            elif name.label in claimed:
                progress = read_progress(self._folder, name)
                if progress is not None:
                    seen += _seen(shard, progress)
                    failures += progress.failures.values()
        return seen, failures


def _seen(shard: Shard, progress: Progress) -> int:
    settled = [*progress.failures, *(key.row for key in progress.samples)]
    return max(settled, default=shard.first_row - 1) - shard.first_row + 1
