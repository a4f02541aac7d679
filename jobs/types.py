"""The nouns that the parts of a job share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from batchinfer.connectors.types import Split


class JobError(Exception):
    """The job can't run as asked: one sentence that names the thing and says what to do. Exit 78."""


class RowError(Exception):
    """One row can't be answered: ``code`` (such as ``render_error``) and one sentence why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class Shard:
    """The unit of claiming and committing: consecutive rows of the input, over one or more splits; in a
    retry round some of them, each with the ``attempts`` that were made at it before."""

    index: int
    splits: tuple[Split, ...]
    estimated_tokens: int
    attempts: Mapping[int, int] | None = None

    @property
    def first_row(self) -> int:
        """Position of the shard's first row in the whole input."""
        return self.splits[0].first_row

    @property
    def rows(self) -> int:
        """Rows of the shard."""
        return sum(split.given for split in self.splits)

    def has(self, row: int) -> bool:
        """Whether the row, by its position in the whole input, belongs to the shard."""
        if self.attempts is not None:
            return row in self.attempts
        return self.first_row <= row < self.first_row + self.rows

    def attempts_before(self, row: int) -> int:
        """How often the row was tried in earlier rounds."""
        return 0 if self.attempts is None else self.attempts[row]
