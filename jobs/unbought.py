"""What a job has spent outside of its budget's slots: the time of workers that began before it had one."""

from __future__ import annotations

from batchinfer.jobs.clock import Clock
from batchinfer.jobs.columns import usd
from batchinfer.jobs.folder import JobFolder
from batchinfer.jobs.records import WorkerRecord

LOOK_AGAIN_SECONDS = 5.0
_GONE = ("left", "failed")


class Unbought:
    """Follows the workers of a job whose time nobody bought.

    Each of them leaves at its next renewal once the job has a budget, so what they spend ends. Until then
    nobody may say how much the cap still pays for, and whoever comes waits.
    """

    def __init__(self, folder: JobFolder, clock: Clock, lease_seconds: float) -> None:
        self._folder = folder
        self._clock = clock
        self._lease_seconds = lease_seconds
        self._versions: dict[str, tuple[str, float]] = {}
        self._records: dict[str, WorkerRecord] = {}

    def look(self) -> None:
        """Read the heartbeats that are new."""
        for worker, info in self._folder.list_workers().items():
            version = info.etag, info.modified
            known = self._records.get(worker)
            # What a worker buys is counted by its slots.
            if self._versions.get(worker) != version and not (known is not None and known.bought):
                self._records[worker] = self._folder.read_worker(worker)
                self._versions[worker] = version

    def spent(self) -> tuple[int, float]:
        """Nanoseconds and USD that were spent up to the last heartbeats."""
        records = [record for record in self._records.values() if not record.bought]
        return (
            sum(record.bill.total for record in records),
            sum(usd(record.bill.total, record.usd_per_hour) or 0.0 for record in records),
        )

    def wait(self) -> None:
        """Wait until all such workers have left, or have been silent for a lease."""
        seen: dict[str, tuple[tuple[str, float], int]] = {}
        while True:
            self.look()
            now, store_now = self._clock.now_ns(), self._folder.last_change()
            at_work = False
            for worker, record in self._records.items():
                if record.bought or record.state in _GONE:
                    continue
                version = self._versions[worker]
                if worker not in seen or seen[worker][0] != version:
                    seen[worker] = version, now
                # Where nobody else says what time it is, our own clock measures its silence.
                silent = max(store_now - version[1], (now - seen[worker][1]) / 1e9)
                at_work = at_work or silent <= self._lease_seconds
            if not at_work:
                return
            self._clock.sleep(min(LOOK_AGAIN_SECONDS, self._lease_seconds / 4))
