"""An engine's process in a pilot: measures how fast decoding steps are, then answers the pilot's rows.

python -P -m batchinfer.jobs.pilot_engine SOCKET PARENT
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from statistics import median

from batchinfer.connectors.types import StorageError
from batchinfer.engine.types import Completion, ModelError, Rejection, Request, SamplingParams
from batchinfer.jobs.engine_child import ServedEngine, load_engine
from batchinfer.jobs.link import Failed
from batchinfer.jobs.pilot_link import Answer, Loaded, Measure, Measured
from batchinfer.jobs.processes import end_with_parent
from batchinfer.jobs.types import JobError

# Steps are measured with so many rows together, as far as the job will have as many and time allows.
BATCHES = (1, 4, 16, 64, 256)
STEPS = 5
LONGEST_SECONDS = 20.0


def main() -> None:
    """Load what the other end of the socket says, measure, answer, and leave."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    end_with_parent(parent, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the parent, and ends us with it
    connection = Connection(descriptor)
    try:
        engine = load_engine(connection.recv())
        connection.send(_loaded(engine))
        connection.send(measure(engine, connection.recv()))
    except EOFError:
        return
    except (ModelError, JobError, StorageError) as error:
        connection.send(Failed(str(error), True))
    except Exception as error:
        connection.send(Failed(f"{type(error).__name__}: {error}", False))
        raise


def _loaded(engine: ServedEngine) -> Loaded:
    runner = getattr(engine, "runner", None)
    if runner is None:
        return Loaded(0, 0, 0)
    return Loaded(runner.num_blocks * runner.block_size, runner.block_size, runner.max_rows)


def measure(engine: ServedEngine, asked: Measure) -> Measured:
    """Measure steps, then answer the requests, all of them together."""
    decode: list[tuple[int, float]] = []
    if asked.requests:
        sampling = _endless(asked.requests[0].sampling)
        begun, slowest = time.perf_counter(), 0.0
        for rows in _batches(asked.most_rows):
            # The next is at worst slower by as much as it has more rows.
            growth = rows / decode[-1][0] if decode else 1.0
            if time.perf_counter() - begun + (STEPS + 1) * growth * slowest > LONGEST_SECONDS:
                break
            slowest = _step_seconds(engine, rows, sampling)
            decode.append((rows, slowest))
    steps: list[float] = []
    answers: list[Answer] = []
    rejections: list[tuple[int, str, str]] = []
    engine.add(asked.requests)
    while engine.has_work:
        seconds, done = _step(engine)
        for item in done:
            if isinstance(item, Rejection):
                rejections.append((item.index, item.code, item.message))
            else:
                answers.append(_answer(item, len(steps)))
        steps.append(seconds)
    return Measured(tuple(decode), tuple(steps), tuple(answers), tuple(rejections))


def _answer(item: Completion, step: int) -> Answer:
    return Answer(
        row=item.index,
        sample=item.sample_index,
        prompt_tokens=item.prompt_tokens,
        cached_tokens=item.cached_tokens,
        tokens=len(item.token_ids),
        finish_reason=item.finish_reason,
        step=step,
    )


def _batches(most: int) -> list[int]:
    return sorted({min(rows, most) for rows in BATCHES})


def _endless(sampling: SamplingParams) -> SamplingParams:
    """The same sampling, whose noise, penalties and log-probabilities take their time, that nothing ends
    before its tokens are there."""
    return replace(
        sampling,
        max_tokens=STEPS + 1,
        min_tokens=0,
        stop=(),
        stop_token_ids=(),
        ignore_eos=True,
        n=1,
        prompt_logprobs=None,
    )


def _step_seconds(engine: ServedEngine, rows: int, sampling: SamplingParams) -> float:
    """Seconds of a step that decodes ``rows`` rows whose prompts are too short to matter."""
    engine.add([Request(row, "a", sampling) for row in range(rows)])
    taken = []
    while engine.has_work:
        taken.append(_step(engine)[0])
    # The first step computes the prompts, and the next may still meet what it left in the caches.
    return median(taken[2:] or taken)


def _step(engine: ServedEngine) -> tuple[float, Sequence[Completion | Rejection]]:
    """Make a step: the seconds that it charges, and what it finished."""
    before = engine.stats
    charged = before.rows_ns + before.waste_ns
    done = engine.step()
    after = engine.stats
    return (after.rows_ns + after.waste_ns - charged) / 1e9, done


if __name__ == "__main__":
    main()
