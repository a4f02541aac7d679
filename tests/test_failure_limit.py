"""The failure limit: which shares of failed rows stop a job."""

from __future__ import annotations

import pytest

from batchinfer.jobs.failure_limit import NO_LIMIT, FailureLimit


@pytest.mark.parametrize(
    ("failed", "seen", "broken"),
    [
        (10, 200, False),
        (11, 200, True),
        (11, 199, False),
        (49, 49, False),
        (50, 50, True),
        (50, 51, False),
        (0, 0, False),
    ],
)
def test_a_share_stops_a_job_after_enough_rows_and_nothing_but_failures_at_once(
    failed: int, seen: int, broken: bool
) -> None:
    assert FailureLimit(0.05, 200).broken_by(failed, seen) is broken


def test_no_limit_is_never_broken() -> None:
    assert not NO_LIMIT.broken_by(1000, 1000)
    assert FailureLimit(0.0, 1).broken_by(1, 1000)
