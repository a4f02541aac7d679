"""The order in which a window of requests enters the batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def order_window(
    prompts: Sequence[npt.NDArray[np.int32]], expected: Sequence[int], block_size: int
) -> list[int]:
    """Places in ``prompts`` (token ids) in the order to run them.

    Prompts that share their first full block form a group and stay together, sorted by token ids, so
    that a shared prefix is computed once and is in the KV cache exactly as long as its group runs.
    Groups (and the prompts that share nothing) follow each other longest first: by the largest
    ``expected`` number of generated tokens, then by the longest prompt, then by first place in the
    window, so that no long one is left over at the end.
    """
    # Big-endian bytes of non-negative ids compare as the ids do.
    keys = [np.asarray(prompt).astype(">u4").tobytes() for prompt in prompts]
    width = 4 * block_size
    groups: dict[bytes | int, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key[:width] if len(key) >= width else place, []).append(place)

    def rank(group: list[int]) -> tuple[int, int, int]:
        longest_expected = max(expected[place] for place in group)
        longest_prompt = max(len(keys[place]) for place in group)
        return -longest_expected, -longest_prompt, group[0]

    return [
        place
        for group in sorted(groups.values(), key=rank)
        for place in sorted(group, key=lambda place: (keys[place], place))
    ]
