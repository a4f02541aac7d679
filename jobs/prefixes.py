"""What prompts share: the tokens that the engine's prefix cache will hold, and which rows are alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from batchinfer.jobs.survey import PromptRow

# Tokens of a block where no engine has said how many its own have: those of the kernels for CPUs.
BLOCK_TOKENS = 32
# Requests that the engine orders among each other.
WINDOW = 2048
_GROUP_TOKENS = 8


def cached_tokens(rows: Sequence[PromptRow], block: int = BLOCK_TOKENS) -> list[int]:
    """How many prompt tokens each row will find in the prefix cache, over all of its samples, when one
    engine gets ``rows`` in this order.

    As the engine does it counts full blocks, and never a whole prompt: its last token is always computed.
    A block is there when a row of the same window, or of the one before, had it too: by then it may
    have been evicted, unless it goes on being used.
    """
    # As the engine orders rows that begin alike: big-endian bytes of ids compare as the ids do.
    order = sorted(
        range(len(rows)), key=lambda place: (place // WINDOW, rows[place].tokens.astype(">u4").tobytes())
    )
    seen: dict[tuple[int, bytes], list[int]] = {}
    found = [0] * len(rows)
    for place in order:
        row, window, node, count = rows[place], place // WINDOW, 0, 0
        data, width = row.tokens.tobytes(), block * row.tokens.itemsize
        usable = (len(row.tokens) - 1) // block
        missed = row.sampling.prompt_logprobs is not None
        for number in range(len(row.tokens) // block):
            key = (node, data[number * width : (number + 1) * width])
            entry = seen.get(key)
            if entry is None:
                entry = seen[key] = [len(seen) + 1, window]
                missed = True
            elif entry[1] < window - 1:
                missed = True
            entry[1] = window
            node = entry[0]
            count += not missed and number < usable
        others = 0 if row.sampling.prompt_logprobs is not None else usable
        found[place] = block * (count + (row.sampling.n - 1) * others)
    return found


def alike(prompts: Sequence[npt.NDArray[np.int32]], fewest: int) -> list[int]:
    """Places of ``prompts`` (token ids) with those that are alike side by side: grouped by the longest
    beginning that at least ``fewest`` of them share, which is mostly one task's instruction, and within
    a group from the shortest to the longest."""
    nodes: dict[tuple[int, bytes], int] = {}
    counts: list[int] = [0]
    paths: list[list[int]] = []
    for prompt in prompts:
        data, width = prompt.tobytes(), _GROUP_TOKENS * prompt.itemsize
        path, node = [0], 0
        for number in range(len(prompt) // _GROUP_TOKENS):
            key = (node, data[number * width : (number + 1) * width])
            node = nodes.setdefault(key, len(nodes) + 1)
            if node == len(counts):
                counts.append(0)
            counts[node] += 1
            path.append(node)
        paths.append(path)

    def group(path: Iterable[int]) -> tuple[int, ...]:
        return tuple(node for node in path if node == 0 or counts[node] >= fewest)

    keys = [(group(path), len(prompt)) for path, prompt in zip(paths, prompts, strict=True)]
    return sorted(range(len(prompts)), key=lambda place: (*keys[place], place))
