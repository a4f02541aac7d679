"""The queue of sequences that are not on the device."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable

from batchinfer.engine.prefix import Node
from batchinfer.engine.sequence import Sequence, State


class WaitingQueue:
    """Sequences in the order in which they are to be admitted.

    Those that come back (preempted, or parked before) go before all others, by ticket. A sequence
    whose prefix a running one is computing is parked until that node is ready or given up. Sequences
    that are DONE are skipped when met.
    """

    def __init__(self) -> None:
        self._next_ticket = 0
        self._waiting: deque[Sequence] = deque()
        self._returned: list[tuple[int, Sequence]] = []
        self._parked: dict[Node, list[Sequence]] = {}

    def append(self, sequence: Sequence) -> None:
        """Queue a new sequence behind all others and give it the next ticket."""
        sequence.ticket = self._next_ticket
        self._next_ticket += 1
        self._waiting.append(sequence)

    def give_back(self, sequence: Sequence) -> None:
        """Queue a sequence again, at its place by ticket before all that were never admitted."""
        heapq.heappush(self._returned, (sequence.ticket, sequence))

    def first(self) -> Sequence | None:
        """The next to be admitted, which stays in the queue; None if none is left but parked ones."""
        while self._returned and self._returned[0][1].state is State.DONE:
            heapq.heappop(self._returned)
        if self._returned:
            return self._returned[0][1]
        while self._waiting and self._waiting[0].state is State.DONE:
            self._waiting.popleft()
        return self._waiting[0] if self._waiting else None

    def pop(self) -> None:
        """Take out what ``first`` just returned."""
        if self._returned:
            heapq.heappop(self._returned)
        else:
            self._waiting.popleft()

    def park(self, node: Node) -> None:
        """Set aside what ``first`` just returned, until ``wake`` names ``node``."""
        sequence = self.first()
        assert sequence is not None
        self.pop()
        self._parked.setdefault(node, []).append(sequence)

    def wake(self, nodes: Iterable[Node]) -> bool:
        """Nobody computes these nodes any more: queue who waited for them. Whether anyone did."""
        woken = False
        for node in nodes:
            for sequence in self._parked.pop(node, ()):
                self.give_back(sequence)
                woken = True
        return woken

    def sequences(self) -> list[Sequence]:
        """All queued and parked sequences that are not DONE, in no particular order."""
        parked = [sequence for group in self._parked.values() for sequence in group]
        queued = [*self._waiting, *(sequence for _, sequence in self._returned), *parked]
        return [sequence for sequence in queued if sequence.state is not State.DONE]

    def check(self) -> None:
        """Assert that nothing is queued twice, and that whatever waits for a node waits for a claim."""
        sequences = self.sequences()
        assert len({id(sequence) for sequence in sequences}) == len(sequences), "queued twice"
        assert all(sequence.state is State.WAITING for sequence in sequences), "queued but running"
        assert not any(node.ready for node in self._parked), "waiting for a node that is ready"
