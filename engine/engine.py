"""The engine as its users see it: a loaded model that completes prompts."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import closing, contextmanager
from itertools import islice
from types import TracebackType
from typing import Any

from batchinfer.engine.config import EngineConfig
from batchinfer.engine.intake import Tokenizer
from batchinfer.engine.loop import EngineLoop, EngineStats
from batchinfer.engine.types import (
    Completion,
    Decoded,
    Message,
    Rejection,
    Request,
    Runner,
    SamplingParams,
)


@contextmanager
def collection_paused() -> Iterator[None]:
    """Keep the garbage collector away from imports and loading.

    They make hundreds of thousands of objects that stay; looking through them again and again takes a
    sixth of the time to import torch.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Engine:
    """A model on one host, ready to complete any number of prompts.

        engine = Engine("path-or-hub-id", dtype="bf16", max_context=2048)
        for completion in engine.generate(["The sky is"], SamplingParams(max_tokens=8)):
            print(completion.text)

    ``generate`` and ``chat`` take a list and return a list, ``run`` takes an iterator and returns one.
    ``add``, ``step`` and ``has_work`` are what those are made of, for callers with a loop of their own.
    Not for use by several threads at a time.
    """

    def __init__(self, model: str, **settings: Any) -> None:
        """Load ``model``; ``settings`` are the other fields of EngineConfig.

        Raises TypeError for an unknown setting, ValueError for one out of range and ModelError for a
        model that can't be loaded as asked.
        """
        config = EngineConfig(model=model, **settings)
        with collection_paused():
            from batchinfer.engine.load import load  # torch takes a second to import

            loaded = load(config)
        self._assemble(config, loaded.runner, loaded.tokenizer, time.perf_counter_ns)
        self.loaded = loaded
        """What was loaded: fingerprint, dtype, sizes and load time."""

    @classmethod
    def from_parts(
        cls,
        config: EngineConfig,
        runner: Runner,
        tokenizer: Tokenizer,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> Engine:
        """An engine on a runner and a tokenizer that exist already; ``clock`` counts nanoseconds."""
        engine = cls.__new__(cls)
        engine._assemble(config, runner, tokenizer, clock)
        return engine

    def _assemble(
        self, config: EngineConfig, runner: Runner, tokenizer: Tokenizer, clock: Callable[[], int]
    ) -> None:
        self.config = config
        self.runner = runner
        self.tokenizer = tokenizer
        self._loop = EngineLoop(runner, tokenizer, config, clock)

    # Whole lists, and streams

    def generate(
        self,
        prompts: str | Seq[str | tuple[int, ...]],
        sampling: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete texts or token ids; completions come in the order of the prompts.

        ``sampling`` is for all prompts, or one for each (default: greedy, 16 tokens). With ``n`` above
        1 a prompt's samples follow each other. Raises ValueError naming the prompt that can't be run;
        then nothing is left running.
        """
        return self._complete([prompts] if isinstance(prompts, str) else list(prompts), sampling)

    def chat(
        self,
        conversations: Seq[Message] | Seq[Seq[Message]],
        sampling: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Answer conversations, each a list of messages (``role`` and ``content``), as ``generate``.

        A single conversation may be given as it is.
        """
        single = bool(conversations) and hasattr(conversations[0], "keys")
        return self._complete([conversations] if single else list(conversations), sampling)

    def _complete(
        self, prompts: list[Any], sampling: SamplingParams | Seq[SamplingParams] | None
    ) -> list[Completion]:
        if sampling is None or isinstance(sampling, SamplingParams):
            each = [sampling or SamplingParams()] * len(prompts)
        else:
            each = list(sampling)
        if len(each) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts but {len(each)} sampling parameters")
        requests = (
            Request(index, prompt, params)
            for index, (prompt, params) in enumerate(zip(prompts, each, strict=True))
        )
        completions = []
        with closing(self.run(requests)) as items:
            for item in items:
                if isinstance(item, Rejection):
                    raise ValueError(f"prompt {item.index} can't be run ({item.code}): {item.message}")
                completions.append(item)
        return sorted(completions, key=lambda item: (item.index, item.sample_index))

    def run(
        self, requests: Iterable[Request], window: int | None = None
    ) -> Generator[Completion | Rejection, None, None]:
        """Complete a stream of requests; yields what finishes as it finishes, one item a sample.

        Reads at most ``window`` requests ahead (default: the configuration's), in chunks of half of
        that, and orders each chunk for the most sharing and the shortest tail. What is unfinished when
        the caller stops iterating is dropped. Raises RuntimeError if the engine is busy.
        """
        if self.has_work:
            raise RuntimeError("the engine is busy with other requests; finish or drop those first")
        size = window or self.config.window
        source = iter(requests)
        exhausted = False
        try:
            while True:
                if not exhausted and self._loop.num_waiting <= size // 2:
                    chunk = list(islice(source, max(1, size // 2) if self._loop.has_work else size))
                    exhausted = not chunk
                    self.add(chunk)
                if exhausted and not self._loop.has_work:
                    return
                yield from self.step()
        finally:
            for index in self._loop.unfinished():
                self.drop(index)
            self.settle()

    # A caller's own loop

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything left to do or to return."""
        return self._loop.has_work

    @property
    def stats(self) -> EngineStats:
        """Counters, accounted time and state."""
        return self._loop.stats

    def add(self, requests: Seq[Request]) -> None:
        """Queue requests, ordered among themselves, behind those added before.

        What can't run comes back as a Rejection from ``step``. Raises ValueError if a sample is
        unfinished already or a ``resume`` is inconsistent.
        """
        self._loop.add(requests)

    def step(self) -> list[Completion | Rejection]:
        """Make one step; returns what it finished, often nothing. Raises EngineError if it fails."""
        return self._loop.step()

    def settle(self) -> list[Completion | Rejection]:
        """Wait for the steps in flight without planning more; returns what they finished."""
        return self._loop.settle()

    def in_flight(self) -> list[tuple[int, int, Decoded]]:
        """(index, sample index, decoded part) of every unfinished sample that has cost or holds
        anything, to go on from there elsewhere (``Request.resume``)."""
        return list(self._loop.in_flight())

    def drop(self, index: int) -> None:
        """Forget a request's unfinished samples; what they cost becomes waste."""
        self._loop.drop(index)

    def close(self) -> None:
        """Release the model's threads and memory; the engine can't be used after that."""
        self.runner.close()

    def __enter__(self) -> Engine:
        """The engine itself, closed at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the engine."""
        self.close()
