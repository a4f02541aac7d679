"""The simulated worlds must see a budget that does not hold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import job_simulator as simulator
import pytest
from simulated_world import Broken

from batchinfer.jobs import supervisor as supervisor_module
from batchinfer.jobs.budget import Allowance, Slots


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def world(seed: int) -> Any:
    """A job of several workers whose budget is used up now and then."""
    budget = simulator.simulated_budget.Budget(100.0, ("time", "usd", "both")[seed % 3])
    return replace(simulator.from_seed(seed), budget=budget, workers=3, shards=5, rows=9)


def test_a_job_that_runs_out_of_its_budget_is_done_when_that_is_raised() -> None:
    raised = 0
    for seed in range(10):
        simulation = world(seed).run()
        raised += len(simulation.budget.caps) - 1
    assert raised > 10


def slots_beyond_the_cap(patch: pytest.MonkeyPatch) -> None:
    limit = Slots._limit
    patch.setattr(Slots, "_limit", lambda self, cap: limit(self, cap) + 1)


def nobody_watches(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Allowance, "watch", lambda self, drain: None)


def settled_for_nothing(patch: pytest.MonkeyPatch) -> None:
    settle = Slots.settle
    patch.setattr(Slots, "settle", lambda self, number, ns, usd: settle(self, number, ns // 2, usd / 2))


def everybody_settles_before_leaving(patch: pytest.MonkeyPatch) -> None:
    """Settles first and does the rest afterwards, with no end set."""
    leave = supervisor_module.Supervisor._leave

    def early(self: Any, *threads: Any) -> int:
        if self._allowance is not None:
            self._allowance.settle(0)
            self._allowance._until = None
            patch.setattr(self._allowance, "settle", lambda code: None)
        return leave(self, *threads)

    patch.setattr(supervisor_module.Supervisor, "_leave", early)


@pytest.mark.parametrize(
    "fault", [slots_beyond_the_cap, nobody_watches, settled_for_nothing, everybody_settles_before_leaving]
)
def test_a_budget_that_does_not_hold_is_seen(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises(Broken):
        for seed in range(20):
            world(seed).run()
