"""Tokens to text while they come: what can't change any more is given out, the rest is held back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Decodes one sample incrementally.

    All that ``push`` and then ``flush`` return, joined, is what ``decode`` makes of all ids, behind
    ``anchor``: tokens before the sample (its prompt's last), since some decoders strip the space at the
    start of a text. Text is held back while it ends inside a UTF-8 character, or in a run of byte
    tokens (``byte_ids``), which decoders judge as a whole. ``skipped_ids`` decode to nothing.

    Only the tokens since the last two points where text was given out are decoded again: the first
    stretch gives the second its context.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        anchor: Sequence[int] = (),
        byte_ids: frozenset[int] = frozenset(),
        skipped_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._decode = decode
        self._byte_ids = byte_ids
        self._skipped_ids = skipped_ids
        # The first ``_given`` of ``_ids`` are given out already, as ``_given_text``.
        self._ids = list(anchor)
        self._given = len(self._ids)
        self._given_text = decode(self._ids) if self._ids else ""

    def push(self, ids: Sequence[int]) -> str:
        """Take the next tokens; returns the text that they settle, maybe empty."""
        # Without the tokens that decoding skips: a run of bytes may reach across them.
        kept = [i for i in ids if i not in self._skipped_ids]
        self._ids.extend(kept)
        if not kept or kept[-1] in self._byte_ids:
            return ""
        text = self._decode(self._ids)
        if text.endswith(_REPLACEMENT) or len(text) <= len(self._given_text):
            return ""
        return self._give(text)

    def flush(self) -> str:
        """The text still held back, now that no token follows."""
        return self._give(self._decode(self._ids))

    def _give(self, text: str) -> str:
        new = text[len(self._given_text) :]
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        self._given_text = self._decode(self._ids)
        return new
