"""Pilots: which rows, what they say of the whole set, what engines take for it, and what is kept of it."""

from __future__ import annotations

import json
import os
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fake_engine
import fake_runner
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import batchinfer
import batchinfer.jobs.plan as planning
from batchinfer import cli
from batchinfer.engine.config import EngineConfig
from batchinfer.engine.engine import Engine
from batchinfer.engine.types import Request, SamplingParams
from batchinfer.jobs import survey as surveying
from batchinfer.jobs.inspection import InspectedModel
from batchinfer.jobs.job import Job
from batchinfer.jobs.lengths import choose_rows, t_quantile, total_range
from batchinfer.jobs.pilot import fit_rates, run_pilot
from batchinfer.jobs.pilot_link import Answer, Loaded, Measured
from batchinfer.jobs.plan import make_plan
from batchinfer.jobs.plan_view import comparison_lines, plan_lines
from batchinfer.jobs.prediction import Prediction, drawn_lengths, job_seconds, predict, scaled_lengths
from batchinfer.jobs.prefixes import alike, cached_tokens
from batchinfer.jobs.spec import JobSpec, parse_spec
from batchinfer.jobs.spec_source import located
from batchinfer.jobs.submit import commit_job, start_workers
from batchinfer.jobs.survey import PromptRow
from batchinfer.jobs.throughput import Load, Rates, engine_seconds, share_out
from batchinfer.jobs.types import JobError

FAKE = Path(__file__).with_name("fake_engine.py")


class TestChosenRows:
    @given(size=st.integers(1, 300), rows=st.integers(1, 80), seed=st.integers(0, 10**6))
    def test_every_row_is_in_one_stratum_and_as_many_are_chosen_as_asked(
        self, size: int, rows: int, seed: int
    ) -> None:
        strata = choose_rows(range(size), rows, seed)
        assert [place for stratum in strata for place in stratum.members] == list(range(size))
        assert sum(len(stratum.chosen) for stratum in strata) == min(rows, size)
        for stratum in strata:
            assert set(stratum.chosen) <= set(stratum.members)
            assert len(set(stratum.chosen)) == len(stratum.chosen) > 0
        assert strata == choose_rows(range(size), rows, seed)

    def test_every_row_is_as_likely(self) -> None:
        counts = [0] * 50
        for seed in range(4000):
            for stratum in choose_rows(range(50), 10, seed):
                for place in stratum.chosen:
                    counts[place] += 1
        # 800 times each on average, give or take 25.
        assert min(counts) > 650 and max(counts) < 950


DISTRIBUTIONS = {
    "short answers, cut": lambda draw: min(48.0, 20 + draw.expovariate(1 / 40)),
    "log-normal": lambda draw: min(1024.0, 1 + draw.lognormvariate(4.0, 0.8)),
    "long-tailed": lambda draw: min(512.0, 1 + draw.lognormvariate(4.0, 1.2)),
    "exponential": lambda draw: min(2048.0, 1 + draw.expovariate(1 / 100)),
    "two kinds": lambda draw: 512.0 if draw.random() < 0.3 else 10.0,
}


class TestTotals:
    @pytest.mark.parametrize("name", DISTRIBUTIONS)
    def test_the_range_holds_the_truth_about_eight_times_in_ten(self, name: str) -> None:
        inside, pilots = 0, 500
        for seed in range(pilots):
            draw = random.Random(seed)
            lengths = [round(DISTRIBUTIONS[name](draw)) for _ in range(400)]
            strata = choose_rows(range(400), 32, seed)
            seen = [[lengths[place] for place in stratum.chosen] for stratum in strata]
            found = total_range([len(stratum.members) for stratum in strata], seen, 400, 400 * max(lengths))
            inside += found.p10 <= sum(lengths) <= found.p90
        assert 0.75 <= inside / pilots <= 0.90

    @settings(max_examples=60)
    @given(
        seen=st.lists(st.lists(st.integers(0, 500), min_size=1, max_size=6), min_size=1, max_size=8),
        more=st.integers(0, 1000),
    )
    def test_ranges_are_ordered_and_within_what_can_be(self, seen: list[list[int]], more: int) -> None:
        sizes = [len(values) + more for values in seen]
        lowest, highest = float(sum(map(sum, seen)) + more), 500.0 * sum(sizes)
        found = total_range(sizes, seen, lowest, highest)
        if more == 0:
            assert found.p10 == found.p50 == found.p90 == sum(map(sum, seen))
        else:
            assert lowest <= found.p10 <= found.p50 <= found.p90 <= highest

    def test_a_pilot_of_equal_rows_is_not_certain(self) -> None:
        found = total_range([100.0], [[48] * 32], 100, 4800)
        assert found.p10 < 4790 < found.p50 == found.p90 == 4800

    def test_what_was_seen_is_no_noise(self) -> None:
        seen = [[float(value) for value in range(40)]]
        half, little = total_range([80], seen, 0, 10**6), total_range([8000], seen, 0, 10**6)
        assert (half.p90 - half.p10) / 80 < 0.8 * (little.p90 - little.p10) / 8000

    def test_a_long_tail_bends_the_range_upwards(self) -> None:
        seen = [[10, 12, 14, 300], [11, 13, 20, 40], [9, 10, 60, 12], [13, 15, 17, 100]]
        found = total_range([1000] * 4, seen, 0, 10**6)
        mean = 250.0 * sum(map(sum, seen))
        assert found.p90 - mean > 1.5 * (mean - found.p10)

    def test_quantiles_of_student(self) -> None:
        for freedom, exact in ((2, 1.8856), (5, 1.4759), (10, 1.3722), (24, 1.3178), (1000, 1.2824)):
            assert t_quantile(0.9, freedom) == pytest.approx(exact, rel=0.01)


def row(index: int, tokens: Sequence[int], **sampling: Any) -> PromptRow:
    params = SamplingParams(**{"max_tokens": 8, **sampling})
    return PromptRow(index, tuple(tokens), np.array(tokens, np.int32), params, params.max_tokens or 1)


class TestPrefixes:
    @settings(max_examples=15, deadline=None)
    @given(seed=st.integers(0, 10**6), n=st.integers(1, 3))
    def test_the_engine_finds_as_many_tokens_in_its_cache(self, seed: int, n: int) -> None:
        draw = random.Random(seed)
        heads = [[draw.randrange(1, 19) for _ in range(draw.randrange(20))] for _ in range(3)]
        prompts = [
            draw.choice(heads) + [draw.randrange(1, 19) for _ in range(draw.randrange(1, 10))]
            for _ in range(20)
        ]
        rows = [row(index, prompt, n=n, max_tokens=1) for index, prompt in enumerate(prompts)]
        config = EngineConfig(model="fake", max_sequences=8, max_batch_tokens=64)
        clock = fake_runner.FakeClock()
        runner = fake_runner.FakeRunner(clock=clock, num_blocks=2000)
        engine = Engine.from_parts(config, runner, fake_runner.FakeTokenizer(), clock)
        requests = [Request(row.index, row.prompt, row.sampling) for row in rows]
        assert len(list(engine.run(requests))) == 20 * n
        assert engine.stats.cached_tokens == sum(cached_tokens(rows, runner.block_size))

    def test_what_nobody_uses_for_a_window_is_gone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("batchinfer.jobs.prefixes.WINDOW", 2)
        prompt = list(range(9))
        other = [row(0, [100 + place]) for place in range(6)]
        same = [row(0, prompt), row(0, prompt)]
        assert sum(cached_tokens([*same, *other[:2], *same], 4)) == 8 + 8
        assert sum(cached_tokens([*same, *same, *other[:2], *same], 4)) == 24 + 8

    def test_rows_that_want_their_prompts_log_probabilities_find_nothing(self) -> None:
        rows = [row(0, range(9), prompt_logprobs=0, n=2)] * 2
        assert cached_tokens(rows, 4) == [0, 0]

    def test_alike_rows_are_side_by_side_from_short_to_long(self) -> None:
        prompts = [
            np.array([task] * 20 + list(range(length)), np.int32) for length in (9, 3, 5) for task in (1, 2)
        ]
        order = alike(prompts, 2)
        assert [(int(prompts[place][0]), len(prompts[place])) for place in order] == [
            (1, 23), (1, 25), (1, 29), (2, 23), (2, 25), (2, 29)
        ]  # fmt: skip


RATES = Rates(
    startup=2.0,
    prefill=1e-3,
    decode=((1, 0.010), (8, 0.024), (64, 0.120)),
    attention=1e-6,
    max_rows=8,
    capacity=8000,
)


class TimedRunner(fake_runner.FakeRunner):
    """A runner whose steps take what ``RATES`` say."""

    def launch(self, plan: Any) -> Any:
        for new in plan.new_rows:
            self.prompts[new.row] = new.num_prompt_tokens
        decoding = np.array(
            [start >= self.prompts[row] for row, start in zip(plan.rows, plan.starts, strict=True)]
        )
        seconds = RATES.prefill * plan.num_tokens[~decoding].sum() + RATES.step(int(decoding.sum()))
        seconds += RATES.attention * plan.starts[decoding].sum()
        self.clock.now += int(seconds * 1e9)
        return super().launch(plan)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prompts = [0] * self.max_rows


def timed_engine() -> Engine:
    config = EngineConfig(model="fake", max_sequences=8, max_batch_tokens=64)
    clock = fake_runner.FakeClock()
    runner = TimedRunner(clock=clock, num_blocks=2000)
    return Engine.from_parts(config, runner, fake_runner.FakeTokenizer(), clock)


class TestTime:
    @settings(max_examples=5, deadline=None)
    @given(seed=st.integers(0, 10**6))
    def test_an_engine_takes_as_long_as_its_steps(self, seed: int) -> None:
        draw = random.Random(seed)
        loads = [Load(0, draw.randrange(1, 40), draw.randrange(1, 60)) for _ in range(60)]
        loads = [Load(load.prompt, load.prompt, load.tokens) for load in loads]
        engine = timed_engine()
        requests = [
            Request(
                place,
                tuple(draw.randrange(1, 19) for _ in range(load.prompt)),
                SamplingParams(max_tokens=load.tokens, ignore_eos=True),
            )
            for place, load in enumerate(loads)
        ]
        list(engine.run(requests))
        assert engine.stats.cached_tokens < 40  # by chance
        assert engine_seconds(RATES, [loads]) == pytest.approx(engine.stats.rows_ns / 1e9, rel=0.08)

    def test_one_row_exactly(self) -> None:
        seconds = engine_seconds(RATES, [[Load(5, 20, 4)]])
        assert seconds == pytest.approx(5e-3 + 3 * 0.010 + 1e-6 * (21 + 22 + 23))
        assert engine_seconds(RATES, []) == engine_seconds(RATES, [[]]) == 0.0

    @settings(max_examples=30, deadline=None)
    @given(
        seed=st.integers(0, 10**6),
        sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8),
        capacity=st.sampled_from([0, 50, 400]),
    )
    def test_every_token_takes_its_time(self, seed: int, sizes: list[int], capacity: int) -> None:
        draw = random.Random(seed)
        shards = [
            [Load(draw.randrange(0, 5000), 5000, draw.randrange(1, 40)) for _ in range(size)]
            for size in sizes
        ]
        tokens = Rates(
            startup=0, prefill=0, decode=((1, 1.0), (64, 64.0)), attention=0, max_rows=4, capacity=capacity
        )
        every = [load for shard in shards for load in shard]
        # The first token of each comes with its prompt.
        least = sum(load.tokens - 1 for load in every)
        assert engine_seconds(tokens, shards) >= least - 1e-6
        prompts = Rates(startup=0, prefill=1.0, decode=(), attention=0, max_rows=4, capacity=capacity)
        assert engine_seconds(prompts, shards) == pytest.approx(sum(load.computed for load in every))

    def test_rows_one_after_another_take_what_each_takes(self) -> None:
        alone = Rates(startup=0, prefill=1e-3, decode=((1, 0.01),), attention=1e-5, max_rows=1, capacity=0)
        first, second = Load(5000, 6000, 30), Load(10, 500, 7)
        both = engine_seconds(alone, [[first], [second]])
        assert both == pytest.approx(engine_seconds(alone, [[first]]) + engine_seconds(alone, [[second]]))

    def test_whoever_is_free_takes_the_next_shard(self) -> None:
        shards = [[Load(1000, 1000, 10)], *([Load(10, 10, 2)] for _ in range(5))]
        owned = share_out(RATES, shards, 2)
        assert [len(taken) for taken in owned] == [1, 5]

    def test_rates_are_found_again_in_what_they_make(self) -> None:
        draw = random.Random(0)
        measured = []
        for _ in range(2):
            engine, steps, answers = timed_engine(), [], []
            prompts = [tuple(draw.randrange(1, 19) for _ in range(draw.randrange(5, 60))) for _ in range(8)]
            sampling = [SamplingParams(max_tokens=draw.randrange(2, 50), ignore_eos=True) for _ in prompts]
            engine.add(
                [Request(place, *both) for place, both in enumerate(zip(prompts, sampling, strict=True))]
            )
            while engine.has_work:
                before = engine.stats.rows_ns
                for item in engine.step():
                    answers.append(
                        Answer(
                            item.index,
                            0,
                            item.prompt_tokens,
                            item.cached_tokens,
                            len(item.token_ids),
                            "length",
                            len(steps),
                        )
                    )
                steps.append((engine.stats.rows_ns - before) / 1e9)
            measured.append(Measured(RATES.decode, tuple(steps), tuple(answers), ()))
        found = fit_rates(2.0, Loaded(8000, 4, 8), measured)
        assert found.decode == RATES.decode
        assert found.prefill == pytest.approx(RATES.prefill, rel=0.02)
        assert found.attention == pytest.approx(RATES.attention, rel=0.1)


class Words(InspectedModel):
    """A model whose tokens are words."""

    def encode(self, prompts: Sequence[Any]) -> list[Any]:
        return [
            np.array([zlib.crc32(word.encode()) % 2**31 for word in str(prompt).split()], np.int32)
            for prompt in prompts
        ]


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = Words("m", "fingerprint", 10**6, 100, None)
    monkeypatch.setattr(planning, "inspect_model", lambda spec: words)
    for name, value in {
        "BATCHINFER_ENGINE_FACTORY": f"{FAKE}:fake_engine",
        "BATCHINFER_CACHE": str(tmp_path / "cache"),
        "BATCHINFER_PACE": json.dumps({"lease": 4.0, "flush": 0.5}),
        "FAKE_TOKENS": "40",
        "FAKE_STEP": "0.001",
    }.items():
        monkeypatch.setenv(name, value)


def make_spec(path: Path, rows: int = 200, **fields: Any) -> JobSpec:
    if not (path / "in.parquet").exists():
        texts = [f"task {number % 3} text {number}" for number in range(rows)]
        pq.write_table(pa.table({"text": texts}), path / "in.parquet")
    values: dict[str, Any] = {
        "model": "m",
        "input": {"uri": str(path / "in.parquet")},
        "prompt": "{{ text }}",
        "sampling": {"max_tokens": 40},
        "output": {"uri": str(path / "out")},
        "workers": {"count": 1, "gpus": 0},
        "price": {"usd_per_hour": 3.6},
    }
    return located(parse_spec(values | fields))


def truth(rows: int) -> int:
    return sum(fake_engine.length_of(row, 0) for row in range(rows))


class TestRun:
    def test_a_pilot_answers_its_rows_as_the_job_would(self, tmp_path: Path) -> None:
        plan = make_plan(make_spec(tmp_path, workers={"count": 2, "gpus": 0}))
        pilot = run_pilot(plan, 12, seed=3)
        assert pilot.rows == 12 and pilot.engines == 2
        for place, lengths in pilot.lengths.items():
            index = plan.survey.rows[place].index
            assert lengths == (fake_engine.length_of(index, 0),)
        assert pilot.finished == {"stop": 12}
        assert pilot.rates.startup > 0
        assert [rows for rows, _ in pilot.rates.decode] == [1, 4, 16, 50]
        prediction = predict(plan, pilot)
        assert prediction.rows == 200
        assert prediction.prompt_tokens.p50 == 200 * 4
        assert prediction.completion_tokens.p10 < prediction.completion_tokens.p90
        assert prediction.usd is not None
        assert prediction.usd.p50 == pytest.approx(prediction.worker_seconds.p50 / 1000)
        assert prediction.worker_seconds.p50 == pytest.approx(2 * prediction.seconds.p50)
        assert Prediction.from_bytes(prediction.to_bytes()) == prediction
        text = "\n".join(plan_lines(plan, prediction))
        for word in ("P10", "P90", "12 rows", "12 by stop", "$3.60", "tokens out", pilot.machine):
            assert word in text

    def test_a_pilot_of_more_rows_than_there_are_takes_all_and_knows(self, tmp_path: Path) -> None:
        plan = make_plan(make_spec(tmp_path, rows=9))
        prediction = predict(plan, run_pilot(plan, 1000))
        assert prediction.pilot_rows == 9
        assert prediction.completion_tokens.p10 == prediction.completion_tokens.p90 == truth(9)

    def test_samples_of_a_row_count_each(self, tmp_path: Path) -> None:
        plan = make_plan(make_spec(tmp_path, rows=6, sampling={"max_tokens": 40, "n": 3}))
        prediction = predict(plan, run_pilot(plan, 6))
        every = sum(fake_engine.length_of(row, sample) for row in range(6) for sample in range(3))
        assert prediction.completion_tokens.p50 == every
        assert prediction.prompt_tokens.p50 == 6 * 4 * 3

    def test_rows_that_fail_in_it_are_told(self, tmp_path: Path) -> None:
        pq.write_table(
            pa.table({"text": ["fine", "too long for it", None, "well"]}), tmp_path / "in.parquet"
        )
        plan = make_plan(make_spec(tmp_path))
        prediction = predict(plan, run_pilot(plan, 4))
        assert plan.estimate.failures == {"render_error": 1}
        assert prediction.rejections == {"too_long": 1}
        text = "\n".join(plan_lines(plan, prediction))
        assert "failed there: too_long 1; such as: the prompt is too long" in text
        assert "will fail    render_error 1" in text

    def test_without_a_price_there_is_only_a_time(self, tmp_path: Path) -> None:
        plan = make_plan(make_spec(tmp_path, price={}, rows=10))
        prediction = predict(plan, run_pilot(plan, 4))
        assert prediction.usd is None
        assert "price.usd_per_hour" in plan_lines(plan, prediction)[-1]

    def test_rows_that_nothing_ends_earlier_are_known(self, tmp_path: Path) -> None:
        plan = make_plan(make_spec(tmp_path, rows=50, sampling={"max_tokens": 7, "ignore_eos": True}))
        assert plan.estimate.fewest_tokens == plan.estimate.completion_tokens == 350
        assert "350, as nothing ends a row earlier" in "\n".join(plan_lines(plan))
        assert predict(plan, run_pilot(plan, 8)).completion_tokens.p10 == 350

    def test_workers_elsewhere_are_said_to_be_others(self, tmp_path: Path) -> None:
        workers = {"backend": "slurm", "count": 40, "gpus": 0}
        plan = make_plan(make_spec(tmp_path, rows=50, workers=workers))
        pilot = run_pilot(plan, 4)
        assert pilot.engines == 1
        assert "workers of slurm differ" in "\n".join(plan_lines(plan, predict(plan, pilot)))

    @pytest.mark.parametrize("rows", [0, -3])
    def test_a_pilot_of_no_rows_is_refused(self, tmp_path: Path, rows: int) -> None:
        with pytest.raises(JobError, match=f"a pilot of {rows} rows"):
            commit_job(make_spec(tmp_path), pilot=rows)
        assert not (tmp_path / "out").exists()

    def test_nothing_to_try(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"text": pa.array([None, None], pa.string())}), tmp_path / "in.parquet")
        with pytest.raises(JobError, match=r"no row can be answered.*null"):
            run_pilot(make_plan(make_spec(tmp_path)), 4)

    @pytest.mark.parametrize(
        ("function", "words"),
        [("refuse", "the weights of m are damaged"), ("leave", "ended with exit code 3")],
    )
    def test_an_engine_that_does_not_load(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, words: str
    ) -> None:
        (tmp_path / "bad.py").write_text(
            "import os\nfrom batchinfer.engine.types import ModelError\n"
            "def refuse(config):\n    raise ModelError('the weights of m are damaged')\n"
            "def leave(config):\n    os._exit(3)\n"
        )
        monkeypatch.setenv("BATCHINFER_ENGINE_FACTORY", f"{tmp_path / 'bad.py'}:{function}")
        plan = make_plan(make_spec(tmp_path, rows=10))
        with pytest.raises(JobError, match=words):
            run_pilot(plan, 4)

    def test_no_engine_outlives_a_pilot_that_fails(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BATCHINFER_ENGINE_FACTORY", f"{FAKE}:no_such_function")
        with pytest.raises(JobError, match="the pilot's engine failed: AttributeError"):
            run_pilot(make_plan(make_spec(tmp_path, rows=10)), 4)
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        commands = [Path(f"/proc/{child}/cmdline").read_bytes() for child in children]
        assert not any(b"pilot_engine" in command for command in commands)


class TestLargeSets:
    def test_a_sample_is_spread_and_says_how_far_off_it_may_be(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(surveying, "WHOLE_ROWS", 1000)
        texts = ["word " * (1 + number % 17 + 20 * (number > 15_000)) for number in range(20_000)]
        pq.write_table(pa.table({"text": texts}), tmp_path / "in.parquet", row_group_size=500)
        plan = make_plan(make_spec(tmp_path))
        survey, found = plan.survey, plan.estimate
        assert not survey.whole and survey.looked_at == surveying.RUNS * surveying.RUN_ROWS
        indexes = [row.index for row in survey.rows]
        assert indexes == sorted(set(indexes)) and len(indexes) == survey.looked_at
        words = sum(len(text.split()) for text in texts)
        assert found.prompt_range.p10 < words < found.prompt_range.p90
        assert found.prompt_range.p90 - found.prompt_range.p10 < 0.3 * words
        assert "by a sample of 2,048 rows" in "\n".join(plan_lines(plan))
        again = make_plan(make_spec(tmp_path))
        assert again.estimate == found

    def test_its_time_grows_with_the_set(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(surveying, "WHOLE_ROWS", 1000)
        texts = [f"text {number}" for number in range(50_000)]
        pq.write_table(pa.table({"text": texts}), tmp_path / "in.parquet", row_group_size=5000)
        seconds = []
        for workers in (1, 4):
            plan = make_plan(make_spec(tmp_path, workers={"count": workers, "gpus": 0}))
            lengths = [(20,)] * len(plan.survey.rows)
            seconds.append(job_seconds(plan, RATES, 32, lengths) - RATES.startup)
        # 8 rows together get a token each in 24 ms, beside their prompts.
        assert seconds[0] == pytest.approx(50_000 * (19 * 0.024 / 8 + 0.002), rel=0.1)
        assert seconds[1] == pytest.approx(seconds[0] / 4, rel=0.05)


def test_lengths_are_drawn_from_rows_that_are_alike(tmp_path: Path) -> None:
    plan = make_plan(make_spec(tmp_path, rows=80))
    pilot = run_pilot(plan, 16)
    drawn = drawn_lengths(plan, pilot)
    for stratum in pilot.strata:
        seen = {pilot.lengths[place] for place in stratum.chosen}
        assert {drawn[place] for place in stratum.members} <= seen
    assert all(1 <= tokens <= 40 for lengths in scaled_lengths(plan, drawn, 3.0) for tokens in lengths)


def test_a_prediction_is_kept_with_its_job_and_told_beside_the_bill(tmp_path: Path) -> None:
    submitted = commit_job(make_spec(tmp_path, rows=60, shards={"rows": 20}), pilot=16)
    assert submitted.prediction is not None
    with start_workers(submitted, attached=True):
        submitted.job.wait()
    job = Job(submitted.job.uri)
    assert job.prediction() == submitted.prediction
    lines = comparison_lines(job.prediction(), job.bill())
    assert [line.split()[0] for line in lines] == ["tokens", "tokens", "time", "price"]
    assert f"actual {truth(60):,}" in lines[1]
    # Submitted again it is the same job, whose prediction stands.
    again = commit_job(make_spec(tmp_path, shards={"rows": 20}), pilot=8)
    assert again.complete and again.prediction is None
    assert job.prediction() == submitted.prediction


class TestCommands:
    def run(self, *words: str) -> int:
        with pytest.raises(SystemExit) as left:
            cli.app(list(words), standalone_mode=False)
        return int(left.value.code or 0)

    def spec_file(self, path: Path, **fields: Any) -> str:
        values = make_spec(path, rows=40, **fields).model_dump(mode="json", exclude_defaults=True)
        (path / "job.json").write_text(json.dumps(values))
        return str(path / "job.json")

    def test_plan_as_one_document(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        spec = self.spec_file(tmp_path)
        words = [
            "plan",
            spec,
            "--pilot",
            "8",
            "--workers",
            "2",
            "--set",
            "price.usd_per_hour=7.2",
            "--json",
        ]
        assert self.run(*words) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["workers"] == 2
        assert document["prediction"]["pilot_rows"] == 8
        assert document["prediction"]["usd_per_hour"] == 7.2
        assert document["prediction"]["completion_tokens"].keys() == {"p10", "p50", "p90"}
        assert document["estimate"]["whole"] is True
        assert not (tmp_path / "out").exists()

    def test_a_pilot_of_no_rows(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run("plan", self.spec_file(tmp_path), "--pilot", "0") == 78
        said = capsys.readouterr().err.strip()
        assert said.count("\n") == 0 and "a pilot of 0 rows" in said

    def test_from_python(self, tmp_path: Path) -> None:
        made, prediction = batchinfer.plan(make_spec(tmp_path, rows=20), pilot=4)
        assert made.rows == 20 and prediction is not None and prediction.pilot_rows == 4
        assert batchinfer.plan(make_spec(tmp_path))[1] is None
