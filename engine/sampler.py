"""Chooses tokens from logits, each row by its own parameters and its own noise, whatever its neighbours.

The order is Hugging Face's: logit bias, repetition penalty, presence and frequency penalties, minimum
length, then temperature, top-k, top-p and min-p. Noise is keyed by (seed, request index, sample index)
and counted by position, so a token depends on neither the batch nor on where the sample was resumed.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import torch

from batchinfer.engine.batch import to_device
from batchinfer.engine.types import NewRow, SamplingParams
from batchinfer.kernels.ops import FilterOperator, Operators

# Below this a distribution is one token for any logits that differ, and divisions would overflow.
_GREEDY_BELOW = 1e-5

# Tokens among which the filters are tried first.
_CANDIDATES = 256

_MASK64 = (1 << 64) - 1


def sampling_key(seed: int, index: int, sample_index: int) -> tuple[int, int]:
    """The Philox key of one sample: the low and the high 32-bit word of a 64-bit mix.

    ``index * 2**16 + sample_index`` and the seed each go through SplitMix64's finalizer (a bijection),
    are combined by exclusive or and mixed again: under one seed no two samples with indexes below
    2**48 and 2**16 share a key.
    """
    sample = _mix(((index << 16) + sample_index) & _MASK64)
    key = _mix(sample ^ _mix((seed + 0x9E3779B97F4A7C15) & _MASK64))
    return key & 0xFFFFFFFF, key >> 32


def _mix(word: int) -> int:
    """SplitMix64's finalizer (Steele et al., OOPSLA 2014): one 64-bit word to another, one to one."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK64
    return word ^ (word >> 31)


class Sampler:
    """The sampling parameters of all rows, and the step from logits to tokens.

    ``eos_token_ids`` are masked, with a row's own stop ids, until it has its ``min_tokens``.
    """

    def __init__(
        self,
        ops: Operators,
        vocab_size: int,
        max_rows: int,
        eos_token_ids: Collection[int],
        device: torch.device,
    ) -> None:
        self._ops = ops
        self._vocab_size = vocab_size
        self._eos = tuple(sorted(eos_token_ids))
        self._device = device
        self._params = [SamplingParams()] * max_rows
        self._prompt_lens = np.zeros(max_rows, np.int64)
        self._keys = np.zeros((max_rows, 2), np.int64)
        names = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
        self._floats = {name: np.zeros(max_rows, np.float32) for name in names}
        self._top_k = np.zeros(max_rows, np.int64)
        self._penalized = np.zeros(max_rows, np.bool_)
        self._filtered = np.zeros(max_rows, np.bool_)
        self._edited = np.zeros(max_rows, np.bool_)

    def set_row(self, new: NewRow) -> None:
        """Take the parameters of the sample that a row is given to."""
        row, params = new.row, new.sampling
        greedy = params.temperature < _GREEDY_BELOW
        self._params[row] = params
        self._prompt_lens[row] = new.num_prompt_tokens
        self._keys[row] = sampling_key(params.seed, new.index, new.sample_index)
        for name, value in (
            ("temperature", 0.0 if greedy else params.temperature),
            ("top_p", params.top_p),
            ("min_p", params.min_p),
            ("repetition", params.repetition_penalty),
            ("presence", params.presence_penalty),
            ("frequency", params.frequency_penalty),
        ):
            self._floats[name][row] = value
        self._top_k[row] = min(params.top_k or self._vocab_size, self._vocab_size)
        self._penalized[row] = (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )
        self._filtered[row] = not greedy and (params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0)
        self._edited[row] = bool(params.logit_bias) or params.min_tokens > 0

    def sample(
        self,
        logits: torch.Tensor,
        rows: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        tokens: torch.Tensor,
    ) -> torch.Tensor:
        """Choose the token at ``positions`` [n] of each of ``rows`` [n]: int64 [n].

        ``logits`` fp32 [n, V] are overwritten. ``tokens`` int32 [max_rows, width] is the token table,
        by which penalties count what came before ``positions``.
        """
        if self._edited[rows].any():
            self._add_bias(logits, rows)
        if self._penalized[rows].any():
            self._penalize(logits, rows, positions, tokens)
        if self._edited[rows].any():
            self._mask_stops(logits, rows, positions)
        if self._filtered[rows].any():
            self._filter(logits, rows)
        return self._ops.sample(
            logits,
            to_device(self._floats["temperature"][rows], self._device),
            to_device(self._keys[rows], self._device),
            to_device(positions.astype(np.int64), self._device),
        )

    def _add_bias(self, logits: torch.Tensor, rows: npt.NDArray[np.int32]) -> None:
        edits = [
            (i, token, bias)
            for i, row in enumerate(rows)
            for token, bias in self._params[row].logit_bias.items()
            if 0 <= token < self._vocab_size
        ]
        if edits:
            places, ids, biases = (list(column) for column in zip(*edits, strict=True))
            logits[places, ids] += torch.tensor(biases, dtype=torch.float32, device=self._device)

    def _mask_stops(
        self, logits: torch.Tensor, rows: npt.NDArray[np.int32], positions: npt.NDArray[np.int32]
    ) -> None:
        edits = [
            (i, token)
            for i, row in enumerate(rows)
            if positions[i] - self._prompt_lens[row] < self._params[row].min_tokens
            for token in self._stops(self._params[row])
            if 0 <= token < self._vocab_size
        ]
        if edits:
            places, ids = (list(column) for column in zip(*edits, strict=True))
            logits[places, ids] = -torch.inf

    def _stops(self, params: SamplingParams) -> tuple[int, ...]:
        return params.stop_token_ids + (() if params.ignore_eos else self._eos)

    def _penalize(
        self,
        logits: torch.Tensor,
        rows: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        tokens: torch.Tensor,
    ) -> None:
        """Repetition (of prompt and output) scales; presence and frequency (of the output) subtract."""
        places = np.flatnonzero(self._penalized[rows])
        chosen = rows[places]
        index = to_device(places, self._device)
        length = to_device(positions[places].astype(np.int64), self._device)[:, None]
        prompt = to_device(self._prompt_lens[chosen], self._device)[:, None]
        history = tokens[
            to_device(chosen.astype(np.int64), self._device), : int(positions[places].max())
        ].long()
        at = torch.arange(history.shape[1], device=self._device)
        zeros = torch.zeros((len(places), self._vocab_size), device=self._device)
        seen = zeros.scatter_add(1, history, (at < length).float()) > 0
        produced = zeros.scatter_add(1, history, ((at >= prompt) & (at < length)).float())
        repetition, presence, frequency = (
            to_device(self._floats[name][chosen], self._device)[:, None]
            for name in ("repetition", "presence", "frequency")
        )
        part = logits[index]
        repeated = torch.where(part > 0, part / repetition, part * repetition)
        part = torch.where(seen, repeated, part)
        logits[index] = part - frequency * produced - presence * (produced > 0)

    def _filter(self, logits: torch.Tensor, rows: npt.NDArray[np.int32]) -> None:
        """Mask what top-k, top-p and min-p leave out, in this order, at the row's temperature.

        On a CPU sorting a vocabulary costs more than the model's step, so a row's best tokens are
        tried first and more of them where all would stay: what is masked is the same.
        """
        places = np.flatnonzero(self._filtered[rows])
        if isinstance(self._ops, FilterOperator):
            chosen = rows[places]
            temperature, top_p, min_p = (
                to_device(self._floats[name][chosen], self._device)
                for name in ("temperature", "top_p", "min_p")
            )
            top_k = to_device(self._top_k[chosen], self._device)
            index = to_device(places.astype(np.int64), self._device)
            self._ops.filter(logits, index, temperature, top_k, top_p, min_p)
            return
        width = self._vocab_size if self._device.type == "cuda" else min(_CANDIDATES, self._vocab_size)
        while len(places):
            done = self._filter_among(logits, places, rows[places], width)
            if width == self._vocab_size:
                return
            places = places[~done.numpy()]
            width = min(16 * width, self._vocab_size)

    def _filter_among(
        self,
        logits: torch.Tensor,
        places: npt.NDArray[np.intp],
        rows: npt.NDArray[np.int32],
        width: int,
    ) -> torch.Tensor:
        """Filter the logits at ``places`` (of ``rows``) whose ``width`` best tokens hold all that stay.

        Returns which those are: bool [len(places)]; the others are left as they are.
        """
        index = to_device(places, self._device)
        temperature, top_p, min_p = (
            to_device(self._floats[name][rows], self._device)[:, None]
            for name in ("temperature", "top_p", "min_p")
        )
        top_k = to_device(self._top_k[rows], self._device)[:, None]
        part = logits[index]
        scores = part / temperature
        values, ids = scores.topk(width, dim=-1)
        # Ties with the k-th best stay. Where k is beyond the candidates, its sum is not known either.
        cut = top_k < self._vocab_size
        kept = ~cut | (values >= values.gather(1, top_k.clamp(max=width) - 1))
        among_kept = values.masked_fill(~kept, -torch.inf).logsumexp(-1, keepdim=True)
        total = torch.where(cut, among_kept, scores.logsumexp(-1, keepdim=True))
        chances = (values - total).exp().masked_fill(~kept, 0.0)
        # Top-p keeps a token while those before it have not reached top_p yet.
        before = chances.cumsum(-1) - chances
        kept &= (before < top_p) | (top_p >= 1.0)
        kept &= chances >= min_p * chances[:, :1]
        done = (~kept[:, -1] & (~cut | (top_k <= width))[:, 0]) | (width == self._vocab_size)
        filtered = torch.full_like(part, -torch.inf)
        filtered.scatter_(1, ids, part.gather(1, ids).masked_fill(~kept, -torch.inf))
        logits[index] = torch.where(done[:, None], filtered, part)
        return done
