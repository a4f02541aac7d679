"""The nouns that the parts of a job share."""

from __future__ import annotations

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
    """The unit of claiming and committing: consecutive rows of the input, over one or more splits."""

    index: int
    splits: tuple[Split, ...]
    estimated_tokens: int

    @property
    def first_row(self) -> int:
        """Position of the shard's first row in the whole input."""
        return self.splits[0].first_row

    @property
    def rows(self) -> int:
        """Rows of the shard."""
        return sum(split.rows for split in self.splits)
