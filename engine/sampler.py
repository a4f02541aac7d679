"""Chooses tokens from logits, each row by its own parameters and its own noise, whatever its neighbours.

The order is Hugging Face's: logit bias, repetition penalty, presence and frequency penalties, minimum
length, then temperature, top-k, top-p and min-p. Noise is keyed by (seed, request index, sample index)
and counted by position, so a token depends on neither the batch nor on where the sample was resumed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

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

# Sets of rows whose parameters are kept on the device: the portions of one step, and of the next.
_SETS_KEPT = 16

_FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")

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


@dataclass(frozen=True, slots=True)
class _RowParameters:
    """The parameters of a set of rows [n] on the device.

    ``rows`` int64 [n], ``prompt_lens`` and ``top_k`` int64 [n], ``keys`` int64 [n, 2], ``floats`` fp32
    [n] by name. ``penalized`` and ``filtered`` are int64 places among the n. ``biases`` are what is added
    to the logits at (place, token): int64, int64 and fp32 of one length.
    """

    rows: torch.Tensor
    prompt_lens: torch.Tensor
    top_k: torch.Tensor
    keys: torch.Tensor
    floats: dict[str, torch.Tensor]
    penalized: torch.Tensor
    filtered: torch.Tensor
    biases: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None


class Sampler:
    """The sampling parameters of all rows, and the step from logits to tokens.

    ``eos_token_ids`` are masked, with a row's own stop ids, until it has its ``min_tokens``. Parameters
    go to the device when the set of rows changes, and stay there while the same rows decode on.
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
        self._floats = {name: np.zeros(max_rows, np.float32) for name in _FLOATS}
        self._top_k = np.zeros(max_rows, np.int64)
        self._penalized = np.zeros(max_rows, np.bool_)
        self._filtered = np.zeros(max_rows, np.bool_)
        self._edited = np.zeros(max_rows, np.bool_)
        self._uploaded: dict[bytes, _RowParameters] = {}

    def set_row(self, new: NewRow) -> None:
        """Take the parameters of the sample that a row is given to."""
        self._uploaded.clear()
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

    def takes_best(self, rows: npt.NDArray[np.int32]) -> bool:
        """Whether each of ``rows`` [n] is given the token of its largest logit, as the model has them."""
        changed = self._penalized[rows] | self._edited[rows] | (self._floats["temperature"][rows] > 0)
        return not changed.any()

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
        parameters = self._parameters(rows)
        at = to_device(positions.astype(np.int64), self._device)
        if parameters.biases is not None:
            places, ids, values = parameters.biases
            logits.index_put_((places, ids), values, accumulate=True)
        if len(parameters.penalized):
            longest = int(positions[self._penalized[rows]].max())
            self._penalize(logits, parameters, at, tokens[:, :longest])
        if self._edited[rows].any():
            self._mask_stops(logits, rows, positions)
        if len(parameters.filtered):
            self._filter(logits, rows)
        return self._ops.sample(logits, parameters.floats["temperature"], parameters.keys, at)

    def _parameters(self, rows: npt.NDArray[np.int32]) -> _RowParameters:
        """Those of ``rows`` [n], uploaded unless the same rows were asked for before."""
        key = rows.tobytes()
        if key not in self._uploaded:
            if len(self._uploaded) >= _SETS_KEPT:
                self._uploaded.clear()
            self._uploaded[key] = self._upload(rows)
        return self._uploaded[key]

    def _upload(self, rows: npt.NDArray[np.int32]) -> _RowParameters:
        integers = np.stack((rows.astype(np.int64), self._prompt_lens[rows], self._top_k[rows]))
        floats = np.stack([self._floats[name][rows] for name in _FLOATS])
        on_rows, prompt_lens, top_k = to_device(integers, self._device).unbind()
        edits = [
            (place, token, bias)
            for place in np.flatnonzero(self._edited[rows]).tolist()
            for token, bias in self._params[rows[place]].logit_bias.items()
            if 0 <= token < self._vocab_size
        ]
        biases = None
        if edits:
            places, ids, values = zip(*edits, strict=True)
            biases = (
                to_device(np.array(places, np.int64), self._device),
                to_device(np.array(ids, np.int64), self._device),
                to_device(np.array(values, np.float32), self._device),
            )
        return _RowParameters(
            rows=on_rows,
            prompt_lens=prompt_lens,
            top_k=top_k,
            keys=to_device(self._keys[rows], self._device),
            floats=dict(zip(_FLOATS, to_device(floats, self._device).unbind(), strict=True)),
            penalized=to_device(np.flatnonzero(self._penalized[rows]), self._device),
            filtered=to_device(np.flatnonzero(self._filtered[rows]), self._device),
            biases=biases,
        )

    def _mask_stops(
        self, logits: torch.Tensor, rows: npt.NDArray[np.int32], positions: npt.NDArray[np.int32]
    ) -> None:
        edits = [
            (place, token)
            for place in np.flatnonzero(self._edited[rows]).tolist()
            if positions[place] - self._prompt_lens[rows[place]] < self._params[rows[place]].min_tokens
            for token in self._stops(self._params[rows[place]])
            if 0 <= token < self._vocab_size
        ]
        if edits:
            places, ids = to_device(np.array(edits, np.int64).T, self._device).unbind()
            logits.index_put_((places, ids), logits.new_full((), -torch.inf))

    def _stops(self, params: SamplingParams) -> tuple[int, ...]:
        return params.stop_token_ids + (() if params.ignore_eos else self._eos)

    def _penalize(
        self,
        logits: torch.Tensor,
        parameters: _RowParameters,
        positions: torch.Tensor,
        tokens: torch.Tensor,
    ) -> None:
        """Repetition (of prompt and output) scales; presence and frequency (of the output) subtract."""
        places = parameters.penalized
        length, prompt = positions[places, None], parameters.prompt_lens[places, None]
        history = tokens[parameters.rows[places]].long()
        at = torch.arange(history.shape[1], device=self._device)
        zeros = torch.zeros((len(places), self._vocab_size), device=self._device)
        seen = zeros.scatter_add(1, history, (at < length).float()) > 0
        produced = zeros.scatter_add(1, history, ((at >= prompt) & (at < length)).float())
        repetition, presence, frequency = (
            parameters.floats[name][places, None] for name in ("repetition", "presence", "frequency")
        )
        part = logits[places]
        repeated = torch.where(part > 0, part / repetition, part * repetition)
        part = torch.where(seen, repeated, part)
        logits[places] = part - frequency * produced - presence * (produced > 0)

    def _filter(self, logits: torch.Tensor, rows: npt.NDArray[np.int32]) -> None:
        """Mask what top-k, top-p and min-p leave out, in this order, at the row's temperature.

        On a CPU sorting a vocabulary costs more than the model's step, so a row's best tokens are
        tried first and more of them where all would stay: what is masked is the same.
        """
        if isinstance(self._ops, FilterOperator):
            parameters = self._parameters(rows)
            chosen, floats = parameters.filtered, parameters.floats
            self._ops.filter(
                logits,
                chosen,
                floats["temperature"][chosen],
                parameters.top_k[chosen],
                floats["top_p"][chosen],
                floats["min_p"][chosen],
            )
            return
        places = np.flatnonzero(self._filtered[rows])
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
