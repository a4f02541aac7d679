"""How long engines take for rows of known lengths, from the rates that a pilot has measured."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from batchinfer.jobs.workbench import OPEN_SHARDS

STEP_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What one engine does on the machine that was measured.

    ``startup`` is the seconds until it is ready, ``prefill`` those of a prompt token that is computed,
    ``decode`` those of a step by how many rows it decodes (ascending) at almost no context, and
    ``attention`` those that each token of context adds to a decoding row's step. ``max_rows`` decode
    together at most, and the KV cache holds ``capacity`` tokens; 0: no limit is known.
    """

    startup: float
    prefill: float
    decode: tuple[tuple[int, float], ...]
    attention: float
    max_rows: int
    capacity: int

    def step(self, rows: int) -> float:
        """Seconds of a step that decodes ``rows`` rows: between the measured numbers of rows, and beyond
        them, on a straight line."""
        if rows == 0 or not self.decode:
            return 0.0
        known = self.decode
        if len(known) == 1 or rows <= known[0][0]:
            return known[0][1]
        place = next((at for at, (count, _) in enumerate(known) if count >= rows), len(known) - 1)
        (few, fast), (many, slow) = known[place - 1], known[place]
        return max(fast, fast + (slow - fast) * (rows - few) / (many - few))


@dataclass(frozen=True, slots=True)
class Load:
    """One sample of a row: prompt tokens to compute, prompt tokens in all, and tokens to generate."""

    computed: int
    prompt: int
    tokens: int


def shard_seconds(rates: Rates, shard: Sequence[Load]) -> float:
    """About how long a shard takes in company, to tell which worker is free first."""
    rows = rates.max_rows or len(shard) or 1
    decode = rates.step(rows) / rows
    return sum(
        rates.prefill * item.computed
        + item.tokens * (decode + rates.attention * (item.prompt + item.tokens / 2))
        for item in shard
    )


def share_out(rates: Rates, shards: Sequence[Sequence[Load]], workers: int) -> list[list[Sequence[Load]]]:
    """Which shards each worker gets when whoever is free takes the next."""
    free = [(0.0, worker) for worker in range(workers)]
    taken: list[list[Sequence[Load]]] = [[] for _ in range(workers)]
    for shard in shards:
        until, worker = free[0]
        taken[worker].append(shard)
        heapq.heapreplace(free, (until + shard_seconds(rates, shard), worker))
    return taken


def engine_seconds(rates: Rates, shards: Sequence[Sequence[Load]]) -> float:
    """Seconds that one engine takes for ``shards``, step by step.

    As a worker does, it has the rows of OPEN_SHARDS shards at a time, the next one's once all of the
    oldest are finished, and gives their tokens one a step to as many rows as fit; a step's prompt tokens
    and rows together are at most STEP_TOKENS.
    """
    coming = deque(shards)
    waiting: deque[tuple[int, Load]] = deque()
    left: dict[int, int] = {}
    # By the step of the last token: its shard, the context that it has by then, what it holds of the cache.
    running: list[tuple[int, int, int, int]] = []
    number = context = held = step = 0
    unfed = 0  # prompt tokens of the row admitted last that no step has computed yet
    seconds = 0.0
    while True:
        while coming and len(left) < OPEN_SHARDS:
            shard = coming.popleft()
            if shard:
                left[number] = len(shard)
                waiting.extend((number, item) for item in shard)
                number += 1
        if not waiting and not running:
            return seconds
        decoding, attended = len(running), context
        budget = max(1, STEP_TOKENS - decoding)
        prompt = min(unfed, budget)
        unfed -= prompt
        while waiting and not unfed and prompt < budget:
            owner, item = waiting[0]
            size = item.prompt + item.tokens
            full = rates.max_rows and len(running) >= rates.max_rows
            if running and (full or (rates.capacity and held + size > rates.capacity)):
                break
            waiting.popleft()
            taken = min(item.computed, budget - prompt)
            prompt += taken
            unfed = item.computed - taken
            # The step that computes the prompt's end brings the first token.
            steps = -(-unfed // STEP_TOKENS) + item.tokens
            heapq.heappush(running, (step + steps - 1, owner, item.prompt + steps, size))
            held += size
            context += item.prompt
        seconds += rates.prefill * prompt + rates.step(decoding) + rates.attention * attended
        context += len(running)
        while running and running[0][0] <= step:
            _, owner, reached, size = heapq.heappop(running)
            held -= size
            context -= reached
            left[owner] -= 1
            if not left[owner]:
                del left[owner]
        step += 1
