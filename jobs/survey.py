"""The prompts of a data set before it runs, tokenized: all rows of a small one, a sample of a large one."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from batchinfer.connectors.readers import GRANULE, InputScan
from batchinfer.connectors.types import BadRow, Row, Split
from batchinfer.engine.types import SamplingParams
from batchinfer.jobs.inspection import InspectedModel
from batchinfer.jobs.prompts import Prompt, Prompts
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.types import JobError, RowError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Up to so many rows and bytes all are looked at; of more a sample, so that planning takes seconds.
WHOLE_ROWS, WHOLE_BYTES = 10_000, 64 << 20
# A sample is runs of neighbours, which cost one read each and share prefixes as neighbours do.
RUNS, RUN_ROWS = 64, 32
# A read inside a row group decodes it from its beginning, so few large ones are opened.
LARGE_UNIT_ROWS, LARGE_UNITS = 4096, 8
_TOKENIZED_TOGETHER = 256

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A row that can be answered: its position in the input, its prompt as it is and as token ids (int32),
    how it is sampled, and the most tokens that each of its samples can get."""

    index: int
    prompt: Prompt
    tokens: npt.NDArray[np.int32]
    sampling: SamplingParams
    most: int

    @property
    def fixed(self) -> bool:
        """Whether it gets exactly the most, as nothing ends it earlier."""
        sampling = self.sampling
        return sampling.ignore_eos and not sampling.stop and not sampling.stop_token_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What was found in ``looked_at`` of the ``total`` rows, in the order of the input.

    ``runs`` are groups of neighbours that were read together, as places in ``rows``, with how many rows
    each had; ``failures`` counts rows that can't be answered, by code, ``first_failure`` says why the
    first of them can't. ``too_long`` are those that do not fit the context: row and tokens.
    """

    total: int
    looked_at: int
    rows: tuple[PromptRow, ...]
    runs: tuple[tuple[int, range], ...]
    failures: Mapping[str, int]
    first_failure: str
    too_long: tuple[tuple[int, int], ...]

    @property
    def whole(self) -> bool:
        """Whether every row was looked at."""
        return self.looked_at == self.total

    @property
    def scale(self) -> float:
        """How many rows of the input each of those looked at stands for."""
        return self.total / self.looked_at if self.looked_at else 0.0

    @property
    def answerable(self) -> int:
        """About how many rows of the whole input can be answered; exact where all were looked at."""
        return round(self.scale * len(self.rows))


def take_survey(
    spec: JobSpec,
    scan: InputScan,
    read: Callable[[Split], Iterable[Row | BadRow]],
    prompts: Prompts,
    model: InspectedModel,
) -> Survey:
    """Look at the rows of ``scan``: the same ones for the same input.

    Raises JobError where the model's chat template refuses every one of them.
    """
    rows: list[PromptRow] = []
    problems: list[RowError] = []
    too_long: list[tuple[int, int]] = []
    runs: list[tuple[int, range]] = []
    shared = spec.sampling_params()
    looked_at = refused = 0
    for run in _runs(scan, read):
        before, count = len(rows), 0
        for part in _chunks(run, _TOKENIZED_TOGETHER):
            count += len(part)
            rendered = _render(part, prompts, shared, problems)
            encoded = model.encode([prompt for _, prompt, _ in rendered])
            for (index, prompt, sampling), tokens in zip(rendered, encoded, strict=True):
                if isinstance(tokens, RowError):
                    problems.append(tokens)
                    refused += 1
                    continue
                room = model.max_context - len(tokens)
                if room <= 0:
                    too_long.append((index, len(tokens)))
                    problem = f"row {index} has {len(tokens):,} tokens of {model.max_context:,} at most"
                    problems.append(RowError("too_long", problem))
                elif not len(tokens):
                    problems.append(RowError("empty_prompt", f"row {index} has an empty prompt"))
                else:
                    most = min(sampling.max_tokens or room, room)
                    rows.append(PromptRow(index, prompt, tokens, sampling, most))
        looked_at += count
        runs.append((count, range(before, len(rows))))
    if refused and refused == looked_at:
        raise JobError(f"the model {spec.model.source} can't take these messages: {problems[0].message}")
    return Survey(
        total=scan.rows,
        looked_at=looked_at,
        rows=tuple(rows),
        runs=tuple(runs),
        failures=dict(sorted(Counter(problem.code for problem in problems).items())),
        first_failure=problems[0].message if problems else "",
        too_long=tuple(too_long),
    )


def _render(
    part: Sequence[Row | BadRow], prompts: Prompts, shared: SamplingParams, problems: list[RowError]
) -> list[tuple[int, Prompt, SamplingParams]]:
    rendered = []
    for row in part:
        if isinstance(row, BadRow):
            problems.append(RowError(row.code, row.message))
            continue
        try:
            own = prompts.sampling
            sampling = shared if own is None else own(row.values)
            rendered.append((row.index, prompts.render(row.values), sampling))
        except RowError as error:
            problems.append(error)
    return rendered


def _runs(
    scan: InputScan, read: Callable[[Split], Iterable[Row | BadRow]]
) -> Iterator[Iterator[Row | BadRow]]:
    """The rows to look at, in groups of neighbours: a file's part each where all are looked at."""
    if scan.rows <= WHOLE_ROWS and sum(item.file.size for item in scan.files) <= WHOLE_BYTES:
        for split in scan.splits(WHOLE_ROWS):
            yield iter(read(split))
        return
    for unit, wanted in _places(list(_units(scan)), scan.rows):
        found = iter(read(replace(unit, only=tuple(row for run in wanted for row in run))))
        for run in wanted:
            yield _until(found, run[-1])


def _until(rows: Iterator[Row | BadRow], last: int) -> Iterator[Row | BadRow]:
    for row in rows:
        yield row
        if row.index >= last:
            return


def _units(scan: InputScan) -> Iterator[Split]:
    """The input in the smallest parts that can be read alone: row groups, parts of a text file, or a
    whole compressed one."""
    first_row = 0
    for item in scan.files:
        if item.file.format == "parquet":
            start = 0
            for group in item.groups:
                if group:
                    yield Split(item.file, "rows", start, start + group, first_row + start, group)
                start += group
        else:
            single = InputScan((item,), scan.schema, scan.rows_per_split)
            for split in single.splits(GRANULE):
                yield replace(split, first_row=first_row + split.first_row)
        first_row += item.rows


def _places(units: Sequence[Split], total: int) -> Iterator[tuple[Split, list[range]]]:
    """Runs of rows at random places, one in each of RUNS equal parts of the input; where parts to be read
    are large, in few of them, each as likely as it is long."""
    draw = random.Random(0)
    large = sum(unit.rows for unit in units) > LARGE_UNIT_ROWS * len(units) and len(units) > LARGE_UNITS
    count = LARGE_UNITS if large else RUNS
    chosen: dict[int, list[int]] = {}
    place = 0
    for number in range(count):
        position = (number + draw.random()) * total / count
        while units[place].first_row + units[place].rows <= position:
            place += 1
        starts = [int(position)]
        if large:
            unit = units[place]
            starts = [unit.first_row + draw.randrange(unit.rows) for _ in range(RUNS // count)]
        chosen.setdefault(place, []).extend(starts)
    for place, starts in sorted(chosen.items()):
        unit, runs, taken = units[place], [], units[place].first_row
        end = unit.first_row + unit.rows
        for start in sorted(starts):
            begin = max(taken, min(start, end - RUN_ROWS))
            taken = min(begin + RUN_ROWS, end)
            if begin < taken:
                runs.append(range(begin, taken))
        if runs:
            yield unit, runs


def _chunks(items: Iterator[T], size: int) -> Iterator[list[T]]:
    chunk: list[T] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
