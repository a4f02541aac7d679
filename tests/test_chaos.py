"""A few runs of ``make chaos``: real processes killed, drained and paused behind a proxy of faults."""

from __future__ import annotations

from pathlib import Path

import chaos
import chaos_checks
import pytest


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize("seed", [0, 1, 3, 6, 9, 17])
def test_whatever_happens_every_row_is_answered_and_paid_for_once(
    seed: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    script = chaos.Script.of(seed)
    server = request.getfixturevalue(f"{script.server}_server")
    answers = chaos_checks.real_answers(script, tmp_path / "undisturbed") if script.real else {}
    print(chaos_checks.HEADER)
    print(chaos.chaos_run(script, server, tmp_path / "run", answers).line())
