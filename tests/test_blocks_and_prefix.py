"""Block pool and prefix tree against a plain model of what they promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.engine.blocks import BlockPool
from batchinfer.engine.prefix import PrefixTree

BLOCK = 2


def ids(*blocks):
    return np.array(blocks, np.int32)


def data(*tokens):
    return np.array(tokens, np.int32).tobytes()


def test_blocks_are_given_out_lowest_first_and_the_last_freed_again_first():
    pool = BlockPool(4)
    assert pool.allocate(3).tolist() == [0, 1, 2]
    pool.release(ids(1, 2))
    assert pool.allocate(2).tolist() == [1, 2]
    pool.check()


def test_more_than_is_free_is_refused():
    pool = BlockPool(2)
    with pytest.raises(ValueError, match="3 blocks asked of 2"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_a_block_being_written_is_owed_not_free():
    pool = BlockPool(1)
    block = pool.allocate(1)
    pool.begin_write(block)
    pool.begin_write(block)
    pool.release(block)
    assert (pool.num_free, pool.num_owed) == (0, 1)
    assert not pool.end_write(block)
    assert pool.end_write(block)
    assert (pool.num_free, pool.num_owed) == (1, 0)
    pool.check()


def test_check_sees_a_broken_count():
    for damage in ("references", "writers", "cached"):
        pool = BlockPool(3)
        pool.allocate(1)
        getattr(pool, damage)[2] = 1
        with pytest.raises(AssertionError):
            pool.check()


def fill(pool, tree, tokens):
    """A sequence that computes all of ``tokens``: its blocks and chain."""
    matched, claim = tree.match(tokens, len(tokens) // (4 * BLOCK))
    assert claim is None
    shared = np.array([node.block for node in matched], np.int32)
    pool.retain(shared)
    needed = -(-len(tokens) // (4 * BLOCK)) - len(matched)
    if needed > pool.num_free:
        tree.evict(needed - pool.num_free)
    blocks = np.concatenate([shared, pool.allocate(needed)])
    chain = tree.enter(tokens, matched, blocks)
    while chain.claims:
        tree.advance(chain, chain.claims[0].key, -1)
    tree.check()
    return blocks, chain


def leave(pool, tree, blocks, chain):
    tree.leave(chain)
    tree.touch_idle(pool.release(blocks))
    tree.check()
    pool.check()


def cached(tree, *tokens):
    """How many blocks of ``tokens`` the tree has ready."""
    return len(tree.match(data(*tokens), len(tokens) // BLOCK)[0])


def test_only_full_blocks_are_entered():
    pool = BlockPool(8)
    tree = PrefixTree(pool, BLOCK)
    fill(pool, tree, data(1, 2, 3, 4, 5))
    assert cached(tree, 1, 2, 3, 4, 5, 6) == 2


def test_least_recently_used_leaves_go_first_and_parents_after_them():
    pool = BlockPool(5)
    tree = PrefixTree(pool, BLOCK)
    for tokens in ((1, 2, 3, 4), (1, 2, 5, 6), (7, 8)):
        leave(pool, tree, *fill(pool, tree, data(*tokens)))
    assert pool.num_free == 1 and pool.num_idle == 4
    leave(pool, tree, *fill(pool, tree, data(1, 2, 3, 4)))  # used again: now the newest
    assert tree.evict(1) == 1 and cached(tree, 1, 2, 5, 6) == 1
    assert tree.evict(1) == 1 and cached(tree, 7, 8) == 0
    assert tree.evict(1) == 1 and cached(tree, 1, 2, 3, 4) == 1
    assert tree.evict(5) == 1 and cached(tree, 1, 2) == 0
    assert pool.num_free == 5


def test_what_a_second_sequence_asked_for_is_kept_from_sparing():
    pool = BlockPool(8)
    tree = PrefixTree(pool, BLOCK)
    leave(pool, tree, *fill(pool, tree, data(1, 2, 3, 4)))
    leave(pool, tree, *fill(pool, tree, data(1, 2, 3, 4, 5, 6)))  # had the first two, and computed one
    leave(pool, tree, *fill(pool, tree, data(7, 8)))
    assert pool.num_idle == 4 and pool.num_fresh == 4
    assert tree.evict_unshared(1) == 1 and cached(tree, 1, 2, 3, 4, 5, 6) == 2
    assert tree.evict_unshared(5) == 1 and cached(tree, 7, 8) == 0
    tree.check()
    assert tree.evict(5) == 2 and pool.num_free == 8 and pool.num_fresh == 4


def test_blocks_in_use_are_not_evicted():
    pool = BlockPool(4)
    tree = PrefixTree(pool, BLOCK)
    used = fill(pool, tree, data(1, 2, 3, 4))
    leave(pool, tree, *fill(pool, tree, data(1, 2, 5, 6)))
    assert tree.evict(4) == 1 and cached(tree, 1, 2, 3, 4) == 2
    leave(pool, tree, *used)
    assert tree.evict(4) == 2


def test_a_claim_is_seen_until_it_is_ready_or_given_up():
    pool = BlockPool(8)
    tree = PrefixTree(pool, BLOCK)
    tokens = data(1, 2, 3, 4, 5, 6)
    blocks = pool.allocate(3)
    chain = tree.enter(tokens, [], blocks)
    claims = list(chain.claims)
    assert tree.match(tokens, 3) == ([], claims[2])
    assert tree.match(tokens, 1) == ([], claims[0])
    assert tree.match(data(1, 2, 9, 9), 2) == ([], claims[0])
    assert tree.match(data(9, 9), 1) == ([], None)
    assert tree.advance(chain, data(1, 2), 0) is claims[0]
    assert tree.match(tokens, 3) == ([claims[0]], claims[2])
    assert tree.leave(chain) == claims[1:]
    assert tree.match(tokens, 3) == ([claims[0]], None)
    tree.check()


def test_a_sequence_that_computed_what_the_tree_has_enters_nothing_more():
    pool = BlockPool(8)
    tree = PrefixTree(pool, BLOCK)
    fill(pool, tree, data(1, 2))
    blocks = pool.allocate(2)
    chain = tree.enter(data(1, 2), [], blocks)
    assert not chain.claims
    assert tree.advance(chain, data(1, 2), int(blocks[0])) is None and chain.node is None
    assert tree.advance(chain, data(3, 4), int(blocks[1])) is None
    assert cached(tree, 1, 2, 3, 4) == 1
    tree.check()


def test_equal_hashes_are_told_apart_by_their_tokens():
    class Colliding(bytes):
        def __hash__(self):
            return 1

        def __getitem__(self, key):
            return Colliding(bytes.__getitem__(self, key))

    pool = BlockPool(8)
    tree = PrefixTree(pool, BLOCK)
    fill(pool, tree, Colliding(data(1, 2, 3, 4)))
    assert len(tree.match(Colliding(data(1, 2, 9, 9)), 2)[0]) == 1
    assert len(tree.match(Colliding(data(9, 9, 3, 4)), 2)[0]) == 0


def test_stale_leaves_do_not_pile_up():
    pool = BlockPool(4)
    tree = PrefixTree(pool, BLOCK)
    for _ in range(2000):
        leave(pool, tree, *fill(pool, tree, data(1, 2, 3, 4)))
    assert len(tree._leaves) < 100


sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=30)


@settings(max_examples=150, deadline=None)
@given(sequences, st.data())
def test_whatever_comes_and_goes_the_tree_has_just_what_it_says(prompts, choices):
    pool = BlockPool(12)
    tree = PrefixTree(pool, BLOCK)
    content: dict[int, tuple] = {}  # what the owner of each block computed last
    running = []
    for tokens in prompts:
        while running and choices.draw(st.booleans()):
            leave(pool, tree, *running.pop(choices.draw(st.integers(0, len(running) - 1))))
        while -(-len(tokens) // BLOCK) > pool.num_free + pool.num_idle:
            leave(pool, tree, *running.pop(0))
        matched = tree.match(data(*tokens), len(tokens) // BLOCK)[0]
        for number, node in enumerate(matched):
            assert content[node.block] == tuple(tokens[: (number + 1) * BLOCK])
        if -(-len(tokens) // BLOCK) - len(matched) > pool.num_free + pool.num_idle - sum(
            pool.references[node.block] == 1 for node in matched
        ):
            continue
        blocks, chain = fill(pool, tree, data(*tokens))
        for number, block in enumerate(blocks[len(matched) :].tolist(), len(matched)):
            content[block] = tuple(tokens[: (number + 1) * BLOCK])
        running.append((blocks, chain))
        assert pool.num_idle >= 0 and tree.match(data(*tokens), len(tokens) // BLOCK)[1] is None
    for entry in running:
        leave(pool, tree, *entry)
    tree.evict(100)
    assert pool.num_free == 12
    tree.check()
