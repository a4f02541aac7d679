"""Sampling: the distributions, their independence of neighbours, penalties, masks and keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from batchinfer.engine.sampler import Sampler, sampling_key
from batchinfer.engine.types import NewRow, SamplingParams
from batchinfer.kernels.reference import ReferenceOperators

VOCABULARY = 40
EOS = 7


def make_sampler(
    params: list[SamplingParams], prompts: list[list[int]], indexes: list[int] | None = None
) -> Sampler:
    sampler = Sampler(ReferenceOperators(), VOCABULARY, len(params), {EOS}, torch.device("cpu"))
    for row, (own, prompt) in enumerate(zip(params, prompts, strict=True)):
        index = indexes[row] if indexes else row
        sampler.set_row(NewRow(row, np.array(prompt, np.int32), len(prompt), own, index, 0))
    return sampler


def table_of(histories: list[list[int]], width: int = 64) -> torch.Tensor:
    """A token table whose cells past a row's history hold stale tokens of earlier rows."""
    table = torch.full((len(histories), width), 3, dtype=torch.int32)
    for row, history in enumerate(histories):
        table[row, : len(history)] = torch.tensor(history, dtype=torch.int32)
    return table


def kept_probabilities(params: SamplingParams, logits: torch.Tensor) -> torch.Tensor:
    """The distribution that transformers' own processors leave."""
    processors = LogitsProcessorList([hf.TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        processors.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        processors.append(hf.MinPLogitsWarper(params.min_p))
    return processors(torch.zeros(1, 1, dtype=torch.long), logits[None].clone())[0].softmax(-1)


CASES = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=1.7, top_k=6),
    SamplingParams(temperature=1.0, top_p=0.7),
    SamplingParams(temperature=1.3, min_p=0.2),
    SamplingParams(temperature=0.9, top_k=12, top_p=0.8, min_p=0.05),
    SamplingParams(temperature=2.0, top_k=1000),
]


@pytest.mark.parametrize("params", CASES)
def test_samples_follow_the_distribution(params: SamplingParams) -> None:
    draws = 20_000
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(5)) * 2
    # 100 requests with 200 positions each: both parts of the noise's counter and key vary.
    sampler = make_sampler([params] * 100, [[1]] * 100)
    rows = np.repeat(np.arange(100, dtype=np.int32), draws // 100)
    positions = np.tile(np.arange(draws // 100, dtype=np.int32), 100)
    tokens = sampler.sample(logits.repeat(draws, 1), rows, positions, table_of([[1]] * 100, 300))
    counts = torch.bincount(tokens, minlength=VOCABULARY).double()
    expected = kept_probabilities(params, logits).double() * draws
    assert not counts[expected == 0].any()
    # Chi-square over cells of at least five expected draws, the rest taken together.
    common = expected >= 5
    observed = torch.cat((counts[common], counts[~common].sum()[None]))
    wanted = torch.cat((expected[common], expected[~common].sum()[None]))
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum().item()
    freedom = len(wanted) - 1
    # The seeds are fixed; five standard deviations above the mean is far from chance.
    assert statistic < freedom + 5 * (2 * max(freedom, 1)) ** 0.5


FILTERS = st.builds(
    SamplingParams,
    temperature=st.floats(0.2, 3.0),
    top_k=st.integers(0, VOCABULARY + 5),
    top_p=st.floats(0.05, 1.0) | st.just(1.0),
    min_p=st.floats(0.0, 1.0) | st.just(0.0),
)


@pytest.mark.parametrize("candidates", [1, 2, 100])
@settings(deadline=None, max_examples=60)
@given(filters=st.lists(FILTERS, min_size=1, max_size=4), seed=st.integers(0, 2**32))
def test_filters_keep_what_transformers_keeps(
    candidates: int, filters: list[SamplingParams], seed: int
) -> None:
    logits = torch.randn(len(filters), VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    sampler = make_sampler(filters, [[1]] * len(filters))
    filtered = logits.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("batchinfer.engine.sampler._CANDIDATES", candidates)
        sampler._filter(filtered, np.arange(len(filters), dtype=np.int32))
    for row, params in enumerate(filters):
        got = (filtered[row] / params.temperature).softmax(-1)
        torch.testing.assert_close(got, kept_probabilities(params, logits[row]), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("candidates", [1, 2, 100])
def test_top_k_keeps_ties(candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchinfer.engine.sampler._CANDIDATES", candidates)
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0] + [0.0] * (VOCABULARY - 4))
    sampler = make_sampler([SamplingParams(temperature=1.0, top_k=2)], [[1]])
    filtered = logits[None].clone()
    sampler._filter(filtered, np.array([0], np.int32))
    assert torch.isfinite(filtered[0]).nonzero().flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize("params", [{"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}])
def test_the_best_token_always_stays(params: dict[str, float]) -> None:
    sampler = make_sampler([SamplingParams(temperature=1.0, **params)], [[1]])
    logits = torch.randn(1, VOCABULARY)
    best = int(logits.argmax())
    sampler._filter(logits, np.array([0], np.int32))
    assert torch.isfinite(logits[0]).nonzero().flatten().tolist() == [best]


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-6, 0.5, 1.0]),
    top_k=st.sampled_from([0, 3, 10]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, -0.7]),
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-5, 5), max_size=3),
    max_tokens=st.just(30),
    min_tokens=st.sampled_from([0, 3, 30]),
    seed=st.integers(0, 5),
    stop_token_ids=st.sampled_from([(), (4, 5)]),
    ignore_eos=st.booleans(),
)
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(PARAMS, TOKENS, TOKENS), min_size=2, max_size=5))
def test_a_token_depends_on_nothing_but_its_own_row(
    rows: list[tuple[SamplingParams, list[int], list[int]]],
) -> None:
    params = [own for own, _, _ in rows]
    prompts = [prompt for _, prompt, _ in rows]
    histories = [prompt + output for _, prompt, output in rows]
    positions = np.array([len(history) for history in histories], np.int32)
    logits = torch.randn(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(1)) * 2
    sampler = make_sampler(params, prompts)
    together = sampler.sample(
        logits.clone(), np.arange(len(rows), dtype=np.int32), positions, table_of(histories)
    )
    for row in range(len(rows)):
        alone = make_sampler([params[row]], [prompts[row]], [row])
        token = alone.sample(
            logits[row : row + 1].clone(),
            np.array([0], np.int32),
            positions[row : row + 1],
            table_of(histories[row : row + 1]),
        )
        assert int(token) == int(together[row])


@settings(deadline=None, max_examples=60)
@given(PARAMS, TOKENS, TOKENS)
def test_logits_are_changed_as_defined(
    params: SamplingParams, prompt: list[int], output: list[int]
) -> None:
    raw = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2)) * 3
    expected = raw.clone()
    for token, bias in params.logit_bias.items():
        expected[token] += bias
    for token in set(prompt + output):
        value = expected[token]
        expected[token] = (
            value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        )
    for token in set(output):
        expected[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    if len(output) < params.min_tokens:
        for token in params.stop_token_ids + (() if params.ignore_eos else (EOS,)):
            expected[token] = -torch.inf

    class Recorder(ReferenceOperators):
        def sample(self, logits, temperature, keys, positions):
            self.seen = logits.clone()
            return super().sample(logits, temperature, keys, positions)

    # A longer neighbour, whose history reaches over this row's stale tokens.
    neighbour = SamplingParams(presence_penalty=1.0)
    sampler = make_sampler([params, neighbour], [prompt, [1]])
    sampler._ops = Recorder()
    sampler._filtered[:] = False
    histories = [prompt + output, list(range(30))]
    positions = np.array([len(history) for history in histories], np.int32)
    sampler.sample(raw.repeat(2, 1), np.arange(2, dtype=np.int32), positions, table_of(histories))
    torch.testing.assert_close(sampler._ops.seen[0], expected)


def test_noise_depends_on_seed_index_sample_and_position_alone() -> None:
    logits = torch.zeros(1, 5000)

    def draw(seed: int, index: int, sample: int, position: int, prompt: int = 1) -> int:
        sampler = Sampler(ReferenceOperators(), 5000, 1, set(), torch.device("cpu"))
        params = SamplingParams(temperature=1.0, seed=seed)
        sampler.set_row(NewRow(0, np.zeros(prompt, np.int32), prompt, params, index, sample))
        return int(
            sampler.sample(
                logits.clone(), np.array([0], np.int32), np.array([position], np.int32), table_of([[1]])
            )
        )

    base = draw(1, 2, 3, 4)
    assert base == draw(1, 2, 3, 4, prompt=4)
    assert len({base, draw(2, 2, 3, 4), draw(1, 3, 3, 4), draw(1, 2, 4, 4), draw(1, 2, 3, 5)}) == 5


def test_keys_are_unique() -> None:
    keys = {sampling_key(0, index, sample) for index in range(100_000) for sample in range(4)}
    keys |= {sampling_key(seed, index, 0) for seed in range(1, 500) for index in range(200)}
    keys |= {sampling_key(2**63 - 1 - seed, 2**40 + index, 0) for seed in range(20) for index in range(500)}
    assert len(keys) == 400_000 + 499 * 200 + 20 * 500
    assert all(0 <= low < 2**32 and 0 <= high < 2**32 for low, high in keys)
    # Each bit is set in about half of them.
    words = np.array(list(keys), np.uint64)
    for word in words.T:
        shares = [float(((word >> np.uint64(bit)) & np.uint64(1)).mean()) for bit in range(32)]
        assert min(shares) > 0.49
        assert max(shares) < 0.51


def test_a_row_given_away_keeps_nothing_of_its_last_sample() -> None:
    sampler = make_sampler(
        [SamplingParams(temperature=1.0, logit_bias={5: 90.0}, repetition_penalty=3.0)], [[1]]
    )
    sampler.set_row(NewRow(0, np.array([1], np.int32), 1, SamplingParams(), 1, 0))
    logits = torch.randn(1, VOCABULARY)
    expected = int(logits.argmax())
    token = sampler.sample(
        logits.clone(), np.array([0], np.int32), np.array([1], np.int32), table_of([[expected]])
    )
    assert int(token) == expected
