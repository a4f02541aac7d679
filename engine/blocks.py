"""The pool of KV blocks: who owns each, which launched steps may still write it, which are free."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BlockIds = npt.NDArray[np.int32]


class BlockPool:
    """Reference counts over the blocks of a KV cache. Holds ids only; never sees the cache itself.

    A block has owners (``references``: sequences, and the prefix tree for blocks that are ``cached``)
    and writers (``writers``: launched steps that may still write it). It is free when it has neither.
    It is *owed* when only writers are left: it becomes free once their steps are done. It is *idle*
    when the prefix tree is its only owner: it can be had by eviction.

    Block ids passed in one call must be distinct; arrays are int32.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.references = np.zeros(num_blocks, np.int32)
        self.writers = np.zeros(num_blocks, np.int32)
        self.cached = np.zeros(num_blocks, np.bool_)
        self.num_free = num_blocks
        self.num_owed = 0
        self.num_idle = 0
        self.num_fresh = num_blocks  # free ones that nobody has had yet
        # A stack: the blocks freed last are given out first, the lowest ids at the start.
        self._free = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)

    def allocate(self, count: int) -> BlockIds:
        """``count`` free blocks with one owner each. Raises ValueError if fewer are free."""
        if count > self.num_free:
            raise ValueError(f"{count} blocks asked of {self.num_free} free")
        top = self.num_free
        ids = self._free[top - count : top][::-1].copy()
        self.num_free -= count
        self.num_fresh = min(self.num_fresh, self.num_free)
        self.references[ids] = 1
        return ids

    def retain(self, ids: BlockIds) -> None:
        """Add an owner to blocks that have one."""
        self.num_idle -= int(np.count_nonzero(self.cached[ids] & (self.references[ids] == 1)))
        self.references[ids] += 1

    def release(self, ids: BlockIds) -> BlockIds:
        """Take an owner from each block; returns those that are idle now, in the order given."""
        self.references[ids] -= 1
        left = self.references[ids]
        ownerless = ids[left == 0]
        if ownerless.size:
            written = self.writers[ownerless] > 0
            self.num_owed += int(np.count_nonzero(written))
            self._push(ownerless[~written])
        idle: BlockIds = ids[(left == 1) & self.cached[ids]]
        self.num_idle += int(idle.size)
        return idle

    def begin_write(self, ids: BlockIds) -> None:
        """A launched step may write these blocks, which have an owner."""
        self.writers[ids] += 1

    def end_write(self, ids: BlockIds) -> bool:
        """That step is done: blocks that nobody owns and nobody else writes become free.

        Returns whether any did."""
        self.writers[ids] -= 1
        done = ids[(self.writers[ids] == 0) & (self.references[ids] == 0)]
        self.num_owed -= int(done.size)
        self._push(done)
        return bool(done.size)

    def cache(self, block: int) -> None:
        """The prefix tree becomes an owner of a block that a sequence owns."""
        self.references[block] += 1
        self.cached[block] = True

    def evict(self, block: int) -> None:
        """The prefix tree gives up an idle block, which becomes free."""
        self.cached[block] = False
        self.references[block] = 0
        self.num_idle -= 1
        self._push(np.array([block], np.int32))

    def _push(self, ids: BlockIds) -> None:
        self._free[self.num_free : self.num_free + ids.size] = ids[::-1]
        self.num_free += int(ids.size)

    def check(self) -> None:
        """Assert that every block is free, owed or owned, that the counts agree, that none is negative,
        and that no block of the prefix tree is still being written."""
        free = self._free[: self.num_free]
        is_free = np.zeros(self.num_blocks, np.bool_)
        is_free[free] = True
        assert int(is_free.sum()) == self.num_free, "a block is in the free list twice"
        fresh = np.arange(self.num_blocks - 1, self.num_blocks - 1 - self.num_fresh, -1)
        assert (free[: self.num_fresh] == fresh).all(), "fresh blocks aren't at the bottom of the stack"
        assert (self.references >= 0).all() and (self.writers >= 0).all(), "a negative count"
        assert (is_free == ((self.references == 0) & (self.writers == 0))).all(), (
            "the free list disagrees with the counts"
        )
        owed = (self.references == 0) & (self.writers > 0)
        assert int(owed.sum()) == self.num_owed, "wrong count of owed blocks"
        idle = self.cached & (self.references == 1)
        assert int(idle.sum()) == self.num_idle, "wrong count of idle blocks"
        assert not (self.cached & (self.writers > 0)).any(), "a cached block may still be written"
        assert not (self.cached & (self.references == 0)).any(), "a cached block without its owner"
