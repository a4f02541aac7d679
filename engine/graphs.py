"""Decode steps as CUDA graphs: recorded once for each of a few batch sizes, then replayed.

A graph launches the hundreds of kernels of a forward pass in one call, so that a step of a small model
isn't as long as the host takes to launch it. It reads and writes fixed addresses: a step's rows and
positions are copied to where the graph reads them, and a batch between two sizes is filled up with a row
that nobody owns.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from batchinfer.engine.batch import DeviceRows, to_device
from batchinfer.engine.models.decoder import Decoder
from batchinfer.engine.types import StepPlan
from batchinfer.kernels.ops import AttentionBatch, KVCache

Replay = Callable[[], None]
Recorder = Callable[[Callable[[], None]], Replay]


def graph_sizes(max_rows: int) -> list[int]:
    """The batch sizes to record: the powers of two, and from 32 rows on three between any two of them.

    Ascending, the last is ``max_rows``. A batch above 32 rows is filled up by less than a quarter.
    """
    sizes, size = [], 1
    while size < max_rows:
        sizes.append(size)
        size += 1 << (size.bit_length() - 3) if size >= 32 else size
    return [*sizes, max_rows]


class CudaRecorder:
    """Records graphs that share one pool of memory: they are replayed one at a time.

    All are run and recorded on one stream, so that what running them takes is taken once.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None

    def __call__(self, work: Callable[[], None]) -> Replay:
        """Record what ``work`` launches; it is run before, so that kernels are compiled and chosen."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            work()
        self._pool = graph.pool()
        replay: Replay = graph.replay
        return replay


class DecodeGraphs:
    """The forward pass of steps in which every sequence computes one token.

    ``rows`` must have a padding row. The sizes are recorded from the largest down, so that the smaller
    ones find their memory in its pool.
    """

    def __init__(
        self, decoder: Decoder, kv: KVCache, rows: DeviceRows, sizes: list[int], recorder: Recorder
    ) -> None:
        assert rows.padding_row is not None
        self._decoder = decoder
        self._kv = kv
        self._rows = rows
        self._padding_row = rows.padding_row
        self._sizes = sizes
        largest, device = sizes[-1], decoder.device
        # [2, rows]: the device rows and the positions of their tokens.
        self._entries = torch.zeros((2, largest), dtype=torch.int32, device=device)
        self._entries[0] = self._padding_row
        self._hidden = torch.empty(
            (largest, decoder.config.hidden_size), dtype=decoder.dtype, device=device
        )
        self._query_starts = torch.arange(largest + 1, dtype=torch.int32, device=device)
        self._replays = {size: recorder(self._work(size)) for size in reversed(sizes)}

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batch sizes recorded, ascending."""
        return tuple(self._sizes)

    def takes(self, plan: StepPlan) -> bool:
        """Whether every sequence of ``plan`` computes one token, and there are no more than recorded."""
        return len(plan.rows) <= self._sizes[-1] and plan.total_tokens == len(plan.rows)

    def forward(self, plan: StepPlan) -> torch.Tensor:
        """Hidden states [S, H] of a plan that it ``takes``, overwritten by the next call."""
        count = len(plan.rows)
        size = self._sizes[bisect_left(self._sizes, count)]
        entries = np.zeros((2, size), np.int32)
        entries[0] = self._padding_row
        entries[0, :count] = plan.rows
        entries[1, :count] = plan.starts
        self._entries[:, :size] = to_device(entries, self._decoder.device)
        self._replays[size]()
        return self._hidden[:count]

    def _work(self, size: int) -> Callable[[], None]:
        def run() -> None:
            rows, positions = (part.long() for part in self._entries[:, :size])
            batch = AttentionBatch(
                query_starts=self._query_starts[: size + 1],
                positions=positions,
                context_lens=(positions + 1).int(),
                block_tables=self._rows.blocks[rows],
                slots=self._rows.slots(rows, positions),
                max_query=1,
                max_context=self._rows.max_context,
            )
            tokens = self._rows.tokens[rows, positions].long()
            self._hidden[:size] = self._decoder.forward(tokens, batch, self._kv)

        return run
