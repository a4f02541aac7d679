"""The KV forecast: how many blocks the running sequences will need at their worst moment."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int32]


def peak_blocks(
    used: int, lengths: Counts, finals: Counts, blocks: Counts, private: Counts, block_size: int
) -> int:
    """The most blocks in use at any later step, if nothing more is admitted.

    ``used`` blocks are in use now. Sequence i has ``lengths[i]`` tokens and ``blocks[i]`` blocks,
    gains a token a step, and ends at ``finals[i]`` tokens, when it frees its ``private[i]`` blocks and
    those gained since. All int32. An upper bound: at most one block a sequence above the exact number.
    """
    remaining = finals - lengths
    order = np.argsort(remaining, kind="stable")
    steps = remaining[order].astype(np.int64)
    alive = np.arange(len(order), 0, -1)

    def over_alive(values: Counts) -> npt.NDArray[np.int64]:
        return np.cumsum(values[order][::-1], dtype=np.int64)[::-1]

    # Usage only falls when a sequence ends, so it peaks at some sequence's last step. There, after
    # ``steps`` more tokens, each one alive has all but its newest token in the cache.
    tokens = over_alive(lengths) + alive * (steps - 1)
    gained = (tokens + alive * (block_size - 1)) // block_size - over_alive(blocks)
    freed = np.cumsum(private[order], dtype=np.int64) - private[order]
    return max(used, int((used + gained - freed).max(initial=0)))
