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
from batchinfer.jobs.unbought import Unbought


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


def late_world(seed: int) -> Any:
    """A job that gets a budget long after its workers have begun, which pays for some more of it."""
    after = simulator.simulated_budget.SLOW + 60 * simulator.SECOND
    kind = ("time", "usd", "both")[seed % 3]
    return simulator.Simulation(
        seed,
        simulator.Faults(),
        budget=simulator.simulated_budget.Budget(1100.0, kind, late=True, after_ns=after),
        shards=30,
        rows=25,
        capacity=2,
    )


def test_a_late_budget_that_forgets_what_was_spent_before_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    late_world(0).run()
    monkeypatch.setattr(Unbought, "spent", lambda self: (0, 0.0))
    with pytest.raises(Broken, match="the bill is"):
        late_world(0).run()


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
