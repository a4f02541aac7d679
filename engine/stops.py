"""When a sequence's own tokens end it, and the text that is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from batchinfer.engine.types import SamplingParams


class Detokenizer(Protocol):
    """Tokens of one sample in, text out, as far as it can no longer change."""

    def push(self, ids: Sequence[int]) -> str:
        """Take the next tokens; the text that they settle, maybe empty."""
        ...


class Decoder(Protocol):
    """The half of a tokenizer that makes text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens left out."""
        ...

    def detokenizer(self) -> Detokenizer:
        """An incremental detokenizer of one sample."""
        ...


class StopCondition:
    """End-of-sequence ids, stop ids and stop strings of one sequence.

    ``never`` is true where only the number of tokens can end it. Text is made while the sequence runs
    only if there are stop strings; a stop string is found wherever token borders fall, and the one that
    is complete first ends the sequence. Nothing ends it before ``min_tokens`` tokens.
    """

    __slots__ = (
        "_cut",
        "_decoder",
        "_detokenizer",
        "_include_stop",
        "_length",
        "_min_tokens",
        "_pieces",
        "_stopped_by_id",
        "_tail",
        "ids",
        "never",
        "strings",
    )

    def __init__(
        self,
        sampling: SamplingParams,
        eos_token_ids: frozenset[int],
        decoder: Decoder,
    ) -> None:
        self.ids = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            self.ids |= eos_token_ids
        self.strings = sampling.stop
        self.never = not self.ids and not self.strings
        self._min_tokens = sampling.min_tokens
        self._include_stop = sampling.include_stop
        self._decoder = decoder
        self._detokenizer: Detokenizer | None = None
        self._stopped_by_id = False
        # Text so far: its pieces, its length, its end (all that a stop string may still start in),
        # and where a stop string cuts it.
        self._pieces: list[str] = []
        self._length = 0
        self._tail = ""
        self._cut: int | None = None

    def push(self, token: int, count: int) -> bool:
        """Whether the sequence ends with ``token``, its ``count``-th; call it for every token."""
        if token in self.ids and count >= self._min_tokens:
            self._stopped_by_id = True
            return True
        if not self.strings:
            return False
        if self._detokenizer is None:
            self._detokenizer = self._decoder.detokenizer()
        return self._add_text(self._detokenizer.push([token]), count >= self._min_tokens)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of the whole sequence, whose generated tokens are ``tokens``.

        Without the token or the string that stopped it, unless the request includes it.
        """
        if self._cut is None:
            hidden = self._stopped_by_id and not self._include_stop
            return self._decoder.decode(tokens[:-1] if hidden else tokens)
        return "".join(self._pieces)[: self._cut]

    def _add_text(self, piece: str, may_stop: bool) -> bool:
        text = self._tail + piece
        before = self._length - len(self._tail)
        self._pieces.append(piece)
        self._length += len(piece)
        if piece and may_stop:
            first = None
            for stop in self.strings:
                # Only what ends in the new piece: anything else was seen, or came before min_tokens.
                at = text.find(stop, max(0, len(self._tail) - len(stop) + 1))
                if at >= 0:
                    found = (at + len(stop), at)
                    first = found if first is None else min(first, found)
            if first is not None:
                end, start = first
                self._cut = before + (end if self._include_stop else start)
                return True
        longest = max(map(len, self.strings))
        self._tail = text[len(text) - longest + 1 :] if len(text) >= longest else text
        return False
