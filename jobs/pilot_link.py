"""What a pilot and its engines say to each other."""

from __future__ import annotations

from dataclasses import dataclass

from batchinfer.engine.types import Request


@dataclass(frozen=True, slots=True)
class Loaded:
    """The engine is ready. ``capacity`` is the tokens that its KV cache holds, ``block`` those of one
    block, ``rows`` the most that it decodes together; 0 where the engine does not say."""

    capacity: int
    block: int
    rows: int


@dataclass(frozen=True, slots=True)
class Measure:
    """To the engine: measure steps of up to ``most_rows`` rows, then answer ``requests``."""

    requests: tuple[Request, ...]
    most_rows: int


@dataclass(frozen=True, slots=True)
class Answer:
    """One sample of a pilot's row: its tokens, and the number of the step that brought its last one."""

    row: int
    sample: int
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    finish_reason: str
    step: int


@dataclass(frozen=True, slots=True)
class Measured:
    """What an engine did.

    ``decode`` are seconds of a step by how many rows it decodes, at almost no context; ``steps`` those of
    each step in which the pilot's rows were answered; ``rejections`` rows that can't run, with code and
    reason.
    """

    decode: tuple[tuple[int, float], ...]
    steps: tuple[float, ...]
    answers: tuple[Answer, ...]
    rejections: tuple[tuple[int, str, str], ...]
