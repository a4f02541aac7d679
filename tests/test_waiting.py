"""The queue of sequences that are not on the device."""

import numpy as np
import pytest

from batchinfer.engine.prefix import Node
from batchinfer.engine.sequence import Sequence, State
from batchinfer.engine.stops import StopCondition
from batchinfer.engine.types import Decoded, SamplingParams
from batchinfer.engine.waiting import WaitingQueue


@pytest.fixture
def sequences(fakes):
    sampling = SamplingParams()
    stops = StopCondition(sampling, frozenset(), fakes.FakeTokenizer())
    return [
        Sequence(i, 0, np.array([1], np.int32), sampling, limit=5, stops=stops, resume=Decoded())
        for i in range(5)
    ]


def drain(queue):
    order = []
    while (sequence := queue.first()) is not None:
        order.append(sequence.index)
        queue.pop()
    return order


def test_those_that_come_back_go_first_in_the_order_they_once_came(sequences):
    queue = WaitingQueue()
    for sequence in sequences:
        queue.append(sequence)
    for _ in range(3):
        queue.pop()
    for index in (2, 0):
        queue.give_back(sequences[index])
    queue.check()
    assert drain(queue) == [0, 2, 3, 4]


def test_who_waits_for_a_prefix_is_passed_over_until_woken(sequences):
    queue = WaitingQueue()
    for sequence in sequences:
        queue.append(sequence)
    one, other = Node(None, b"1", 0, 1), Node(None, b"2", 1, 2)
    for node in (one, other, one):
        assert queue.first() is not None
        queue.park(node)
    queue.check()
    assert queue.first() is sequences[3]
    assert {s.index for s in queue.sequences()} == {0, 1, 2, 3, 4}
    assert not queue.wake([Node(None, b"3", 2, 3)])
    assert queue.wake([one]) and not queue.wake([one])
    queue.check()
    assert drain(queue) == [0, 2, 3, 4]
    assert queue.wake([other]) and drain(queue) == [1]


def test_those_that_are_done_are_skipped(sequences):
    queue = WaitingQueue()
    for sequence in sequences[:4]:
        queue.append(sequence)
    queue.pop()
    queue.give_back(sequences[0])
    for index in (0, 1, 3):
        sequences[index].state = State.DONE
    assert [s.index for s in queue.sequences()] == [2]
    assert drain(queue) == [2]
