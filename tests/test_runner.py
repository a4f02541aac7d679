"""The runner: chunks, rows and blocks, log-probabilities, damaged weights, and the worker thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from cpu_levels import LEVELS
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.engine.batch import DeviceRows
from batchinfer.engine.graphs import graph_sizes
from batchinfer.engine.models.decoder import Decoder, DecoderConfig
from batchinfer.engine.models.layers import LayerConfig, RopeConfig
from batchinfer.engine.runner import TorchRunner
from batchinfer.engine.types import EngineError, NewRow, SamplingParams, StepCosts, StepPlan
from batchinfer.engine.weights import DummyCheckpoint, WeightReader
from batchinfer.kernels.ops import operators_for
from batchinfer.kernels.reference import ReferenceOperators

CPU = torch.device("cpu")
VOCABULARY = 60
CONFIG = DecoderConfig(
    architecture="LlamaForCausalLM",
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    layers=(LayerConfig(0, RopeConfig(100.0, 4)),) * 2,
    max_context=128,
    rms_eps=1e-5,
    activation="silu",
    attention_scale=0.5,
)


class Weights(DummyCheckpoint):
    """Larger than the dummy's own, so that logits differ clearly."""

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = super().read(name, shape)
        return tensor if len(shape) == 1 else tensor * 20


def make_runner(max_rows: int = 8, **options: Any) -> TorchRunner:
    ops = ReferenceOperators()
    decoder = Decoder(CONFIG, WeightReader("m", Weights(), torch.float32, CPU), ops, 128)
    kv = ops.allocate_kv(CONFIG.kv_spec(torch.float32), 64 + ("recorder" in options), CPU)
    costs = StepCosts(1, 1, 1, 1, 1, 1, 1)
    limits: dict[str, Any] = {"max_rows": max_rows, "max_context": 128}
    return TorchRunner(decoder, ops, kv, eos_token_ids=(), costs=costs, **limits, **options)


def logits_of(tokens: list[int]) -> torch.Tensor:
    """Raw logits at every position, from one undivided pass: fp32 [len(tokens), V]."""
    runner = make_runner()
    plan = plan_of([(0, len(tokens), 0)], new={0: (tokens, SamplingParams(), 0)})
    with torch.inference_mode():
        runner._rows.update(plan)
        inputs = runner._rows.inputs(plan)
        return runner._decoder.logits(runner._decoder.forward(inputs.tokens, inputs.attention, runner._kv))


def plan_of(
    entries: list[tuple[int, int, int]],
    samples: list[bool] | None = None,
    new: dict[int, tuple[list[int], SamplingParams, int]] | None = None,
    index: int = 0,
) -> StepPlan:
    """A plan of (row, tokens, start); a new row gets eight blocks of its own, in descending order."""
    new = new or {}
    rows = list(new)
    return StepPlan(
        index=index,
        rows=np.array([row for row, _, _ in entries], np.int32),
        num_tokens=np.array([count for _, count, _ in entries], np.int32),
        starts=np.array([start for _, _, start in entries], np.int32),
        samples=np.array(samples if samples is not None else [True] * len(entries)),
        new_rows=tuple(
            NewRow(row, np.array(tokens, np.int32), len(tokens), params, index, 0)
            for row, (tokens, params, index) in new.items()
        ),
        block_rows=np.repeat(np.array(rows, np.int32), 8),
        block_positions=np.tile(np.arange(8, dtype=np.int32), len(rows)),
        block_ids=np.concatenate([np.arange(8, dtype=np.int32)[::-1] + 8 * row for row in rows])
        if rows
        else np.empty(0, np.int32),
    )


def prompt_of(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.data())
def test_any_cut_into_steps_gives_the_same_tokens(lengths: list[int], data: st.DataObject) -> None:
    prompts = {row: prompt_of(length, row) for row, length in enumerate(lengths)}
    expected = {}
    for row, prompt in prompts.items():
        tokens = list(prompt)
        for _ in range(4):
            tokens.append(int(logits_of(tokens)[-1].argmax()))
        expected[row] = tokens[len(prompt) :]
    runner = make_runner()
    new = {row: (prompt, SamplingParams(), row) for row, prompt in prompts.items()}
    done, got = dict.fromkeys(prompts, 0), {row: [] for row in prompts}
    index = 0
    while unfinished := [row for row in prompts if len(got[row]) < 4]:
        active = (
            data.draw(st.lists(st.sampled_from(unfinished), min_size=1, unique=True))
            if index
            else unfinished
        )
        entries, samples = [], []
        for row in active:
            left = len(prompts[row]) + len(got[row]) - done[row]
            count = data.draw(st.integers(1, left))
            entries.append((row, count, done[row]))
            samples.append(count == left)
        result = runner.launch(plan_of(entries, samples, new if index == 0 else None, index)).result()
        for (row, count, _), sampled, token in zip(entries, samples, result.tokens, strict=True):
            done[row] += count
            assert sampled == (token >= 0)
            if sampled:
                got[row].append(int(token))
        index += 1
    assert got == expected


def test_a_row_given_to_another_sample_starts_afresh() -> None:
    runner = make_runner()
    first, second = prompt_of(30, 1), prompt_of(9, 2)
    runner.launch(plan_of([(3, 30, 0)], new={3: (first, SamplingParams(logprobs=1), 0)})).result()
    result = runner.launch(plan_of([(3, 9, 0)], new={3: (second, SamplingParams(), 1)}, index=1)).result()
    assert result.tokens.tolist() == [int(logits_of(second)[-1].argmax())]
    assert not result.logprobs


def test_logprobs_are_of_the_raw_logits_for_rows_that_ask() -> None:
    prompts = [prompt_of(7, 1), prompt_of(12, 2), prompt_of(3, 3), prompt_of(5, 4)]
    params = [
        SamplingParams(logprobs=3, temperature=5.0, top_k=9, presence_penalty=2.0, logit_bias={4: 50.0}),
        SamplingParams(),
        SamplingParams(logprobs=0),
        SamplingParams(logprobs=1000),
    ]
    runner = make_runner()
    entries = [(row, len(prompt), 0) for row, prompt in enumerate(prompts)]
    new = {row: (prompt, params[row], row) for row, prompt in enumerate(prompts)}
    samples = [True, True, True, True]
    result = runner.launch(plan_of(entries, samples, new)).result()
    assert sorted(result.logprobs) == [0, 2, 3]
    assert result.tokens[0] == 4
    for row, width in ((0, 3), (2, 0), (3, VOCABULARY)):
        expected = logits_of(prompts[row])[-1].log_softmax(-1)
        scores = result.logprobs[row]
        np.testing.assert_allclose(scores.chosen, [expected[result.tokens[row]]], atol=1e-5)
        assert scores.top.shape == scores.top_ids.shape == (1, width)
        np.testing.assert_allclose(scores.top[0], expected.topk(width).values, atol=1e-5)
        np.testing.assert_allclose(expected[scores.top_ids[0]], scores.top[0], atol=1e-5)


def test_prompt_logprobs_cover_what_is_inside_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchinfer.engine.runner._LOGITS_ROWS", 4)
    prompt, other = prompt_of(23, 1), prompt_of(6, 2)
    expected = logits_of(prompt).log_softmax(-1)
    runner = make_runner()
    # Two tokens decoded before: the row is recomputed, its prompt ends at 23.
    row = NewRow(1, np.array([*prompt, 5, 6], np.int32), 23, SamplingParams(prompt_logprobs=2), 0, 0)
    found = []
    for index, (start, count) in enumerate([(0, 10), (10, 11), (21, 3), (24, 1)]):
        entries = [(0, 6, 0), (1, count, start)] if index == 0 else [(1, count, start)]
        plan = plan_of(
            entries,
            [False] * len(entries),
            {0: (other, SamplingParams(), 1)} if index == 0 else None,
            index,
        )
        if index == 0:
            blocks = np.arange(8, dtype=np.int32)
            plan = replace(
                plan,
                new_rows=(*plan.new_rows, row),
                block_rows=np.concatenate((plan.block_rows, np.ones(8, np.int32))),
                block_positions=np.concatenate((plan.block_positions, blocks)),
                block_ids=np.concatenate((plan.block_ids, blocks + 40)),
            )
        result = runner.launch(plan).result()
        assert len(result.prompt_logprobs) == (index < 3)
        for place, scores in result.prompt_logprobs.items():
            assert place == len(entries) - 1
            found.append(scores)
    assert [len(scores.chosen) for scores in found] == [10, 11, 1]
    chosen = np.concatenate([scores.chosen for scores in found])
    np.testing.assert_allclose(chosen, [expected[i, prompt[i + 1]] for i in range(22)], atol=1e-5)
    top = np.concatenate([scores.top for scores in found])
    np.testing.assert_allclose(top, expected[:22].topk(2).values, atol=1e-5)
    assert found[0].top_ids.dtype == np.int32


def test_prompt_logprobs_cost_other_steps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = {0: prompt_of(9, 1), 1: prompt_of(12, 2)}
    runner, trimmed = make_runner(), []
    forward = runner._decoder.forward

    def watched(*arguments: Any) -> torch.Tensor:
        trimmed.append(len(arguments) == 4)
        return forward(*arguments)

    monkeypatch.setattr(runner._decoder, "forward", watched)
    tokens = []
    for index, (entries, samples) in enumerate(
        [
            ([(0, 5, 0)], [False]),
            ([(0, 4, 5)], [True]),
            # The first one decodes while the second one's prompt is computed.
            ([(0, 1, 9), (1, 7, 0)], [True, False]),
            ([(0, 1, 10), (1, 5, 7)], [True, True]),
        ]
    ):
        new = {0: (prompts[0], SamplingParams(prompt_logprobs=1), 0)} if index == 0 else None
        if index == 2:
            new = {1: (prompts[1], SamplingParams(), 1)}
        result = runner.launch(plan_of(entries, samples, new, index)).result()
        assert len(result.prompt_logprobs) == (index < 2)
        tokens.append(result.tokens.tolist())
    assert trimmed == [False, False, True, True]
    answer = [*prompts[0], *(step[0] for step in tokens[1:])]
    assert answer[9:] == [int(logits_of(answer[:n])[-1].argmax()) for n in (9, 10, 11)]
    assert tokens[3][1] == int(logits_of(prompts[1])[-1].argmax())


@pytest.mark.parametrize("operators", ["reference", *(["cpu"] if LEVELS else [])])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=0.7, top_k=3),
        SamplingParams(min_tokens=1, stop_token_ids=(9,)),
    ],
    ids=["greedy", "noisy", "filtered", "masked"],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_logit_that_is_not_finite_names_the_request(
    value: float, sampling: SamplingParams, operators: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner()
    monkeypatch.setattr(runner._sampler._ops, "sample", operators_for(CPU, operators).sample)
    prompts = {0: ([1, 2, 3], SamplingParams(), 70), 1: ([4, 5], sampling, 71)}
    whole = runner._decoder.logits

    def damaged(hidden: torch.Tensor) -> torch.Tensor:
        logits = whole(hidden)
        logits[1, 9] = value
        return logits

    monkeypatch.setattr(runner._decoder, "logits", damaged)
    handle = runner.launch(plan_of([(0, 3, 0), (1, 2, 0)], new=prompts))
    with pytest.raises(EngineError, match="logits for request 71 are not finite"):
        handle.result()


def test_damaged_weights_are_seen() -> None:
    runner = make_runner()
    runner._decoder._embeddings[5] = torch.inf
    handle = runner.launch(plan_of([(1, 2, 0)], new={1: ([4, 5], SamplingParams(), 7)}))
    with pytest.raises(EngineError, match="logits for request 7 are not finite"):
        handle.result()


def test_many_rows_are_sampled_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = {row: (prompt_of(3 + row, row), SamplingParams(logprobs=1), row) for row in range(8)}
    entries = [(row, 3 + row, 0) for row in range(8)]
    samples = [row != 2 for row in range(8)]
    whole = make_runner().launch(plan_of(entries, samples, prompts)).result()
    monkeypatch.setattr("batchinfer.engine.runner._LOGITS_ROWS", 3)
    cut = make_runner().launch(plan_of(entries, samples, prompts)).result()
    assert whole.tokens.tolist() == cut.tokens.tolist()
    assert whole.tokens[2] == -1
    assert list(whole.logprobs) == list(cut.logprobs) == [0, 1, 3, 4, 5, 6, 7]
    for place in whole.logprobs:
        np.testing.assert_allclose(whole.logprobs[place].chosen, cut.logprobs[place].chosen, atol=1e-6)


def test_steps_in_flight_run_in_launch_order_on_one_thread() -> None:
    prompt = prompt_of(10, 1)
    tokens = list(prompt)
    for _ in range(5):
        tokens.append(int(logits_of(tokens)[-1].argmax()))
    runner = make_runner(steps_in_flight=2)
    gate = threading.Event()
    assert runner._worker is not None
    runner._worker.submit(gate.wait)
    handles = [runner.launch(plan_of([(0, 10, 0)], new={0: (prompt, SamplingParams(), 0)}))]
    # Launched before the first has even begun: its input is the token that the first will write.
    handles += [runner.launch(plan_of([(0, 1, 9 + i)], index=i)) for i in range(1, 5)]
    gate.set()
    results = [handle.result() for handle in handles]
    assert [int(result.tokens[0]) for result in results] == tokens[10:]
    assert sorted(result.completed_ns for result in results) == [result.completed_ns for result in results]
    runner.close()


def test_a_step_that_fails_raises_from_its_handle() -> None:
    for steps in (1, 2):
        runner = make_runner(steps_in_flight=steps)
        handle = runner.launch(plan_of([(0, 3, 0)], new={0: ([1, 2, VOCABULARY + 5], SamplingParams(), 0)}))
        with pytest.raises(IndexError):
            handle.result()
        runner.close()


def test_step_inputs_follow_the_block_tables() -> None:
    rows = DeviceRows(4, 32, 4, CPU)
    plan = StepPlan(
        index=0,
        rows=np.array([2, 0], np.int32),
        num_tokens=np.array([3, 1], np.int32),
        starts=np.array([3, 0], np.int32),
        samples=np.array([True, True]),
        new_rows=(
            NewRow(2, np.arange(10, 18, dtype=np.int32), 8, SamplingParams(), 0, 0),
            NewRow(0, np.array([7], np.int32), 1, SamplingParams(), 1, 0),
        ),
        block_rows=np.array([2, 2, 0], np.int32),
        block_positions=np.array([0, 1, 0], np.int32),
        block_ids=np.array([9, 4, 6], np.int32),
    )
    rows.update(plan)
    inputs = rows.inputs(plan)
    assert inputs.tokens.tolist() == [13, 14, 15, 7]
    assert inputs.last.tolist() == [2, 3]
    batch = inputs.attention
    assert batch.positions.tolist() == [3, 4, 5, 0]
    assert batch.slots.tolist() == [9 * 4 + 3, 4 * 4, 4 * 4 + 1, 6 * 4]
    assert batch.query_starts.tolist() == [0, 3, 4]
    assert batch.context_lens.tolist() == [6, 1]
    assert batch.block_tables[0].tolist() == [9, 4]
    assert batch.block_tables[1, 0] == 6
    assert (batch.max_query, batch.max_context) == (3, 6)


@given(st.integers(1, 3000))
def test_graph_sizes_are_few_and_close(max_rows: int) -> None:
    sizes = graph_sizes(max_rows)
    assert sizes[-1] == max_rows and len(sizes) <= 35
    for smaller, larger in pairwise(sizes):
        assert smaller < larger <= (2 * smaller if smaller < 32 else 1.25 * smaller)


class Recorded:
    """Keeps what a graph would launch and launches it again at each replay, counted by size."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        work()

        def replay() -> None:
            self.replays += 1
            work()

        return replay


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.data())
def test_replayed_decodes_of_any_batch_are_the_plain_ones(lengths: list[int], data: st.DataObject) -> None:
    """Rows join in any order and sit out at times: batches are filled up, and between two sizes."""
    recorder = Recorded()
    runners = [make_runner(), make_runner(recorder=recorder)]
    assert [runner.num_blocks for runner in runners] == [64, 64]
    kinds = [
        SamplingParams(logprobs=2),
        SamplingParams(temperature=1.0, seed=4),
        SamplingParams(frequency_penalty=0.5),
    ]
    new = {
        row: (prompt_of(length, row), kinds[row % len(kinds)], row) for row, length in enumerate(lengths)
    }
    known = dict(enumerate(lengths))
    plan = plan_of([(row, length, 0) for row, length in known.items()], new=new)
    decodes = 0
    for _ in range(6):
        plain, replayed = (runner.launch(plan).result() for runner in runners)
        assert plain.tokens.tolist() == replayed.tokens.tolist()
        assert plain.logprobs.keys() == replayed.logprobs.keys()
        for entry, scores in plain.logprobs.items():
            for mine, others in zip(scores, replayed.logprobs[entry], strict=True):
                np.testing.assert_allclose(mine, others, atol=1e-5)
        for row in plan.rows.tolist():
            known[row] += 1
        rows = data.draw(st.lists(st.sampled_from(sorted(known)), min_size=1, unique=True))
        plan = plan_of([(row, 1, known[row] - 1) for row in rows])
        decodes += 1
    assert recorder.replays >= decodes - 1


def test_a_step_with_a_prompt_in_it_is_not_replayed() -> None:
    recorder = Recorded()
    runner = make_runner(recorder=recorder)
    runner.launch(plan_of([(0, 5, 0)], new={0: (prompt_of(5, 0), SamplingParams(), 0)})).result()
    new = {1: (prompt_of(3, 1), SamplingParams(), 1)}
    runner.launch(plan_of([(0, 1, 5), (1, 3, 0)], new=new)).result()
    assert recorder.replays == 0
    runner.launch(plan_of([(0, 1, 6), (1, 1, 3)])).result()
    assert recorder.replays == 1


def test_filling_up_a_batch_writes_to_nobodys_blocks() -> None:
    """The blocks of row 0 have another owner by now: what fills up a batch of three must not be row 0."""
    runners = [make_runner(), make_runner(recorder=Recorded())]
    params = SamplingParams(logprobs=2)
    first = plan_of([(0, 9, 0)], new={0: (prompt_of(9, 0), params, 0)})
    rows = {row: (prompt_of(9, row), params, row) for row in (1, 2, 3)}
    second = plan_of([(row, 9, 0) for row in rows], new=rows)
    heir = np.where(second.block_rows == 1, second.block_ids - 8, second.block_ids)
    plans = [first, replace(second, block_ids=heir), plan_of([(row, 1, 9) for row in rows])]
    results = [[runner.launch(plan).result() for plan in plans][-1] for runner in runners]
    for plain, replayed in zip(*(result.logprobs.values() for result in results), strict=True):
        np.testing.assert_allclose(plain.top, replayed.top, atol=1e-5)
