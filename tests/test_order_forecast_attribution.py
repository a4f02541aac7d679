"""The pure parts of the engine's planning: order, KV forecast, split of a step's time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.engine.attribution import StepWork, split_by_largest_remainder, split_step
from batchinfer.engine.forecast import peak_blocks
from batchinfer.engine.order import order_window
from batchinfer.engine.types import StepCosts

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=8)
windows = st.lists(st.tuples(tokens, st.integers(1, 5)), max_size=25)


def arrays(prompts):
    return [np.array(prompt, np.int32) for prompt in prompts]


@settings(max_examples=200, deadline=None)
@given(windows, st.integers(1, 4))
def test_order_keeps_groups_together_sorted_and_the_longest_first(window, block_size):
    prompts, expected = [w[0] for w in window], [w[1] for w in window]
    order = order_window(arrays(prompts), expected, block_size)
    assert sorted(order) == list(range(len(window)))

    groups: list[list[int]] = []
    for place in order:
        head = prompts[place][:block_size]
        same = groups and len(head) == block_size and prompts[groups[-1][-1]][:block_size] == head
        if same:
            groups[-1].append(place)
        else:
            groups.append([place])
    heads = [tuple(prompts[g[0]][:block_size]) for g in groups if len(prompts[g[0]]) >= block_size]
    assert len(set(heads)) == len(heads), "a group is torn apart"
    for group in groups:
        assert [prompts[place] for place in group] == sorted(prompts[place] for place in group)
    longest = [max(expected[place] for place in group) for group in groups]
    assert longest == sorted(longest, reverse=True)


def test_order_of_equals_is_their_first_place_and_large_ids_sort_as_numbers():
    prompts = arrays([[70000, 1], [300, 2], [70000, 0], [300, 1], [5, 5]])
    assert order_window(prompts, [1, 1, 1, 1, 1], 1) == [2, 0, 3, 1, 4]
    assert order_window(prompts, [1, 1, 1, 1, 9], 1) == [4, 2, 0, 3, 1]
    assert order_window([], [], 4) == []


sequence = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5))


@settings(max_examples=200, deadline=None)
@given(st.lists(sequence, min_size=1, max_size=12), st.sampled_from([1, 3, 8, 16]), st.integers(0, 9))
def test_forecast_is_at_most_a_block_a_sequence_above_stepping_through(states, size, other):
    lengths = [length for length, _, _ in states]
    finals = [length + more for length, more, _ in states]
    blocks = [-(-length // size) for length in lengths]
    private = [max(0, count - shared) for count, (_, _, shared) in zip(blocks, states, strict=True)]
    used = sum(blocks) + other
    exact, held = used, used
    for step in range(1, max(f - n for f, n in zip(finals, lengths, strict=True)) + 1):
        alive = [i for i in range(len(states)) if finals[i] - lengths[i] >= step]
        gone = [i for i in range(len(states)) if i not in alive]
        held = used - sum(private[i] for i in gone)
        held += sum(max(0, -(-(lengths[i] + step - 1) // size) - blocks[i]) for i in alive)
        exact = max(exact, held)
    found = peak_blocks(
        used, *(np.array(x, np.int32) for x in (lengths, finals, blocks, private)), block_size=size
    )
    assert exact <= found <= exact + len(states)


def test_forecast_of_nothing_is_what_is_used():
    nothing = np.empty(0, np.int32)
    assert peak_blocks(7, nothing, nothing, nothing, nothing, 16) == 7


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2**53),
    st.lists(st.floats(0, 1e12, allow_subnormal=False), min_size=1, max_size=40).filter(any),
)
def test_largest_remainder_is_exact_fair_and_never_negative(total, weights):
    array = np.array(weights)
    parts = split_by_largest_remainder(total, array)
    assert int(parts.sum()) == total and parts.min() >= 0
    assert not parts[array == 0].any()
    if total < 2**40:
        assert np.abs(parts - total * (array / array.sum())).max() <= 1.001


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [float("nan")], [float("inf"), 1.0]])
def test_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        split_by_largest_remainder(10, np.array(weights))


COSTS = StepCosts(
    flops_per_token=2.7e8,
    flops_per_sample=5.6e7,
    attention_flops=1.4e5,
    kv_bytes_per_token=23040.0,
    weight_bytes=2.7e8,
    flops_rate=1e12,
    bytes_rate=2e10,
)


def work(*entries):
    """Entries of (start, tokens, samples, prompt tokens, computed before, useful)."""
    columns = list(zip(*entries, strict=True))
    starts, counts, prompts, before = (np.array(columns[i], np.int32) for i in (0, 1, 3, 4))
    return StepWork(starts, counts, np.array(columns[2]), prompts, before, np.array(columns[5]))


entries = st.tuples(
    st.integers(0, 2000),
    st.integers(1, 500),
    st.booleans(),
    st.integers(1, 2500),
    st.integers(0, 2500),
    st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**11), st.lists(entries, min_size=1, max_size=50))
def test_a_steps_parts_sum_to_its_time_and_lie_where_they_belong(interval, steps):
    shares = split_step(COSTS, interval, work(*steps))
    total = shares.prefill.sum() + shares.decode.sum() + shares.waste.sum()
    assert int(total) == interval
    for place, (start, count, samples, prompt, before, useful) in enumerate(steps):
        prefill, decode, waste = (int(x[place]) for x in (shares.prefill, shares.decode, shares.waste))
        assert min(prefill, decode, waste) >= 0
        if not useful:
            assert prefill == decode == 0
            continue
        first = min(max(start, before), start + count)
        if first >= min(prompt, start + count):
            assert prefill == 0
        if first == start:
            assert waste == 0
        if not samples and max(first, prompt) >= start + count:
            assert decode == 0


def test_equal_entries_cost_the_same_and_more_context_costs_more():
    shares = split_step(
        COSTS, 10**9, work(*[(100, 1, True, 50, 0, True)] * 3, (1900, 1, True, 50, 0, True))
    )
    assert np.ptp(shares.decode[:3]) <= 1
    assert shares.decode[3] > shares.decode[0] * 1.5
    assert not shares.prefill.any() and not shares.waste.any()


def test_splitting_a_prompt_in_chunks_moves_only_the_shared_weights():
    """A chunk's operations are those of its own positions: two chunks sum to the whole."""
    costs = StepCosts(1e6, 0.0, 1e4, 0.0, 0.0, 1e12, 1e12)
    whole = split_step(costs, 10**9, work((0, 100, False, 100, 0, True), (0, 1, False, 9, 0, True)))
    parts = split_step(
        costs,
        10**9,
        work((0, 60, False, 100, 0, True), (60, 40, False, 100, 0, True), (0, 1, False, 9, 0, True)),
    )
    assert abs(int(whole.prefill[0] - parts.prefill[:2].sum())) <= 2


def test_a_step_of_nothing_is_refused():
    nothing = np.empty(0, np.int32)
    flags = np.empty(0, np.bool_)
    with pytest.raises(ValueError, match="without sequences"):
        split_step(COSTS, 5, StepWork(nothing, nothing, flags, nothing, nothing, flags))
