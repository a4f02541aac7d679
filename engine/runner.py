"""Executes step plans on one device: inputs, forward pass, sampling and log-probabilities."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from batchinfer.engine.batch import DeviceRows, to_device
from batchinfer.engine.graphs import DecodeGraphs, Recorder, graph_sizes
from batchinfer.engine.models.decoder import Decoder
from batchinfer.engine.sampler import Sampler
from batchinfer.engine.types import EngineError, RowLogprobs, StepCosts, StepPlan, StepResult
from batchinfer.kernels.ops import KVCache, Operators

# Rows of logits held at once: 256 of a vocabulary of 152k take 156 MB.
_LOGITS_ROWS = 256


@dataclass(frozen=True, slots=True)
class _Scores:
    """Log-probabilities as tensors: fp32 [k], int64 [k, width], fp32 [k, width]."""

    chosen: torch.Tensor
    top_ids: torch.Tensor
    top: torch.Tensor

    def rows(self, start: int, end: int, width: int) -> RowLogprobs:
        """A part of it in numpy."""
        return RowLogprobs(
            self.chosen[start:end].numpy(),
            self.top_ids[start:end, :width].numpy().astype(np.int32),
            self.top[start:end, :width].numpy(),
        )


@dataclass(frozen=True, slots=True)
class _SampledScores:
    """Log-probabilities of the tokens sampled for ``entries``, each with its own ``widths``."""

    entries: npt.NDArray[np.intp]
    widths: npt.NDArray[np.int64]
    scores: _Scores


@dataclass(frozen=True, slots=True)
class _Outcome:
    """A step whose work is queued. Host tensors are filled once ``event`` (CUDA) has happened."""

    num_entries: int
    sampled: npt.NDArray[np.intp]
    indexes: npt.NDArray[np.int64]
    tokens: torch.Tensor
    finite: torch.Tensor
    logprobs: list[_SampledScores]
    prompt_logprobs: Mapping[int, _Scores]
    completed_ns: int
    event: torch.cuda.Event | None

    def collect(self) -> StepResult:
        """Wait, check, and turn into numpy."""
        completed_ns = self.completed_ns
        if self.event is not None:
            self.event.synchronize()
            completed_ns = time.perf_counter_ns()
        broken = np.flatnonzero(~self.finite.numpy())
        if len(broken):
            raise EngineError(
                f"The model's logits for request {self.indexes[broken[0]]} are not finite; "
                "its weights are damaged or overflow this dtype (try bf16 or fp32)."
            )
        tokens = np.full(self.num_entries, -1, np.int32)
        tokens[self.sampled] = self.tokens.numpy()
        return StepResult(
            tokens,
            completed_ns,
            {
                int(entry): part.scores.rows(i, i + 1, int(width))
                for part in self.logprobs
                for i, (entry, width) in enumerate(zip(part.entries, part.widths, strict=True))
            },
            {
                entry: scores.rows(0, len(scores.chosen), scores.top.shape[1])
                for entry, scores in self.prompt_logprobs.items()
            },
        )


class _Handle:
    """A launched step, running in this thread's past or in the worker's future."""

    def __init__(self, outcome: Future[_Outcome]) -> None:
        self._outcome = outcome

    def result(self) -> StepResult:
        """Wait for the step; raises what it raised."""
        return self._outcome.result().collect()


class TorchRunner:
    """Runs one decoder; see :class:`~batchinfer.engine.types.Runner` for its contract.

    On a CPU with ``steps_in_flight`` above 1 a worker thread runs the steps in launch order, so that
    the next one is planned meanwhile; otherwise ``launch`` itself computes. On CUDA ``launch`` queues.
    With a ``recorder`` steps of decodes alone are recorded by it and replayed, and the cache's last block
    is theirs.
    """

    def __init__(
        self,
        decoder: Decoder,
        ops: Operators,
        kv: KVCache,
        *,
        max_rows: int,
        max_context: int,
        eos_token_ids: Collection[int],
        costs: StepCosts,
        steps_in_flight: int = 1,
        recorder: Recorder | None = None,
    ) -> None:
        self.steps_in_flight = steps_in_flight
        self.block_size = kv.block_size
        self.num_blocks = kv.num_blocks if recorder is None else kv.num_blocks - 1
        self.max_rows = max_rows
        self.max_context = max_context
        self.costs = costs
        self._decoder = decoder
        self._kv = kv
        self._device = decoder.device
        self.fresh_blocks_cost = decoder.device.type == "cpu"
        self._rows = DeviceRows(
            max_rows,
            max_context,
            kv.block_size,
            self._device,
            None if recorder is None else self.num_blocks,
        )
        self._graphs = None if recorder is None else self._record(recorder)
        self._sampler = Sampler(ops, decoder.config.vocab_size, max_rows, eos_token_ids, self._device)
        self._prompt_lens = np.zeros(max_rows, np.int64)
        self._indexes = np.zeros(max_rows, np.int64)
        self._logprobs = np.full(max_rows, -1, np.int64)
        self._prompt_logprobs = np.full(max_rows, -1, np.int64)
        self._keeps_logits = np.zeros(max_rows, np.bool_)
        threaded = self._device.type == "cpu" and steps_in_flight > 1
        self._worker = ThreadPoolExecutor(1, "batchinfer-steps") if threaded else None

    def launch(self, plan: StepPlan) -> _Handle:
        """Queue a step behind those launched before."""
        if self._worker is not None:
            return _Handle(self._worker.submit(self._run, plan))
        outcome: Future[_Outcome] = Future()
        try:
            outcome.set_result(self._run(plan))
        except Exception as error:
            outcome.set_exception(error)
        return _Handle(outcome)

    @torch.inference_mode()
    def _record(self, recorder: Recorder) -> DecodeGraphs:
        return DecodeGraphs(self._decoder, self._kv, self._rows, graph_sizes(self.max_rows), recorder)

    def close(self) -> None:
        """Finish what was launched and end the worker thread."""
        if self._worker is not None:
            self._worker.shutdown()

    @torch.inference_mode()
    def _run(self, plan: StepPlan) -> _Outcome:
        for new in plan.new_rows:
            self._sampler.set_row(new)
            self._prompt_lens[new.row] = new.num_prompt_tokens
            self._indexes[new.row] = new.index
            self._keeps_logits[new.row] = new.sampling.keeps_logits
            for wanted, width in (
                (self._logprobs, new.sampling.logprobs),
                (self._prompt_logprobs, new.sampling.prompt_logprobs),
            ):
                wanted[new.row] = -1 if width is None else min(width, self._decoder.config.vocab_size)
        self._rows.update(plan)
        scored = self._scored(plan)
        if self._graphs is not None and self._graphs.takes(plan):
            hidden = last = self._graphs.forward(plan)
        else:
            inputs = self._rows.inputs(plan)
            if scored.any():
                hidden = self._decoder.forward(inputs.tokens, inputs.attention, self._kv)
                last = hidden[inputs.last]
            else:
                hidden = last = self._decoder.forward(
                    inputs.tokens, inputs.attention, self._kv, inputs.last
                )
        prompt_logprobs = self._score_prompts(plan, scored, hidden)
        sampled = np.flatnonzero(plan.samples)
        tokens, finite, logprobs = self._sample(plan, sampled, last)
        indexes = self._indexes[plan.rows[sampled]]
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return _Outcome(
            num_entries=len(plan.rows),
            sampled=sampled,
            indexes=indexes,
            tokens=tokens,
            finite=finite,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            completed_ns=time.perf_counter_ns(),
            event=event,
        )

    def _sample(
        self, plan: StepPlan, sampled: npt.NDArray[np.intp], last: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[_SampledScores]]:
        """Choose the tokens of the entries ``sampled`` and write them to the token table.

        ``last`` [S, H] are the hidden states of each entry's last token. Returns host tensors: tokens
        and whether the logits were finite, both [len(sampled)], and log-probabilities where asked.
        """
        table = self._rows.tokens
        logprobs: list[_SampledScores] = []
        tokens, finite = [], []
        for start in range(0, len(sampled), _LOGITS_ROWS):
            entries = sampled[start : start + _LOGITS_ROWS]
            rows = plan.rows[entries]
            positions = plan.starts[entries] + plan.num_tokens[entries]
            every = len(entries) == len(last)
            hidden = last if every else last[to_device(entries, self._device)]
            wanted = np.flatnonzero(self._logprobs[rows] >= 0)
            best = None
            if not len(wanted) and self._sampler.takes_best(rows):
                best = self._decoder.best_logits(hidden)
            if best is not None:
                chosen, values = best
                finite.append(values.isfinite())
            else:
                logits = self._decoder.logits(hidden)
                # On a CPU a logit that is no number or plus infinity is chosen before any other, unless the
                # sampler masks it: then nothing else needs to be looked at.
                kept = self._device.type == "cpu" and bool(self._keeps_logits[rows].all())
                if not kept:
                    finite.append(logits.amax(-1).isfinite())
                if len(wanted):
                    # The sampler overwrites the logits; log-probabilities are of the raw ones.
                    index = to_device(wanted, self._device)
                    raw = logits[index]
                chosen = self._sampler.sample(logits, rows, positions, table)
                if kept:
                    finite.append(logits.gather(1, chosen[:, None])[:, 0].isfinite())
            table[to_device(rows, self._device).long(), to_device(positions, self._device).long()] = (
                chosen.int()
            )
            tokens.append(chosen)
            if len(wanted):
                widths = self._logprobs[rows[wanted]]
                scores = self._scores_to_host([_scores(raw, chosen[index], int(widths.max()))])
                logprobs.append(_SampledScores(entries[wanted], widths, scores))
        if not tokens:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool), []
        return self._to_host(torch.cat(tokens)), self._to_host(torch.cat(finite)), logprobs

    def _scored(self, plan: StepPlan) -> npt.NDArray[np.int64]:
        """Of how many tokens of each entry the following prompt token is to be scored."""
        inside = np.minimum(plan.num_tokens, self._prompt_lens[plan.rows] - 1 - plan.starts)
        return np.where(self._prompt_logprobs[plan.rows] >= 0, inside.clip(0), 0)

    def _score_prompts(
        self, plan: StepPlan, scored: npt.NDArray[np.int64], hidden: torch.Tensor
    ) -> dict[int, _Scores]:
        """Log-probabilities of the prompt tokens that follow those just computed, by entry.

        ``hidden`` [T, H] where any are ``scored``.
        """
        ends = plan.num_tokens.cumsum()
        found: dict[int, _Scores] = {}
        for entry in np.flatnonzero(scored):
            row, start, count = int(plan.rows[entry]), int(plan.starts[entry]), int(scored[entry])
            first = int(ends[entry]) - int(plan.num_tokens[entry])
            parts = []
            for at in range(0, count, _LOGITS_ROWS):
                stop = min(at + _LOGITS_ROWS, count)
                logits = self._decoder.logits(hidden[first + at : first + stop])
                chosen = self._rows.tokens[row, start + at + 1 : start + stop + 1].long()
                parts.append(_scores(logits, chosen, int(self._prompt_logprobs[row])))
            found[int(entry)] = self._scores_to_host(parts)
        return found

    def _scores_to_host(self, parts: list[_Scores]) -> _Scores:
        """Consecutive parts as one, on the host."""
        return _Scores(
            self._to_host(torch.cat([part.chosen for part in parts])),
            self._to_host(torch.cat([part.top_ids for part in parts])),
            self._to_host(torch.cat([part.top for part in parts])),
        )

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory, on CUDA queued behind the work that makes it."""
        if tensor.device.type == "cpu":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)


def _scores(logits: torch.Tensor, chosen: torch.Tensor, width: int) -> _Scores:
    """Log-probabilities, by logits [k, V], of ``chosen`` [k] and of the ``width`` best; on their device."""
    total = logits.logsumexp(-1, keepdim=True)
    top = logits.topk(width, dim=-1)
    return _Scores((logits.gather(1, chosen[:, None]) - total)[:, 0], top.indices, top.values - total)
