"""The Engine facade on a fake runner: lists, streams, and a caller's own loop."""

import gc
import itertools
import random
from contextlib import closing
from dataclasses import replace

import pytest

from batchinfer.engine.config import EngineConfig
from batchinfer.engine.engine import Engine
from batchinfer.engine.types import Completion, ModelError, Rejection, Request, SamplingParams


@pytest.fixture
def engine(fakes):
    return make_engine(fakes)


def make_engine(fakes, **settings):
    config = EngineConfig(
        model="fake", **{"max_sequences": 8, "max_batch_tokens": 64, "steps_in_flight": 2, **settings}
    )
    clock = fakes.FakeClock()
    runner = fakes.FakeRunner(
        steps_in_flight=config.steps_in_flight, clock=clock, num_blocks=100, fail_at=settings.get("fail_at")
    )
    return Engine.from_parts(config, runner, fakes.FakeTokenizer(), clock)


def expected(fakes, engine, index, prompt, sampling, sample=0):
    ids = list(prompt) if isinstance(prompt, tuple) else engine.tokenizer.encode_batch([prompt])[0]
    return fakes.expected_completion(Request(index, prompt, sampling), ids, sample, 128)


def test_generate_answers_in_the_order_of_the_prompts(fakes, engine):
    prompts = ["one", "a much longer prompt than the others", "two", (3, 4, 5), "one"]
    sampling = SamplingParams(max_tokens=9)
    answers = engine.generate(prompts, sampling)
    assert [fakes.without_cost(answer) for answer in answers] == [
        expected(fakes, engine, index, prompt, sampling) for index, prompt in enumerate(prompts)
    ]
    assert not engine.has_work


def test_generate_takes_one_prompt_and_samples_follow_each_other(fakes, engine):
    sampling = SamplingParams(max_tokens=5, n=3, temperature=1.0)
    answers = engine.generate("once", sampling)
    assert [(a.index, a.sample_index) for a in answers] == [(0, 0), (0, 1), (0, 2)]
    assert len({a.token_ids for a in answers}) > 1


def test_generate_takes_sampling_for_each_prompt(engine):
    each = [SamplingParams(max_tokens=k, ignore_eos=True) for k in (1, 4, 2)]
    assert [len(a.token_ids) for a in engine.generate(["a", "b", "c"], each)] == [1, 4, 2]
    with pytest.raises(ValueError, match="2 prompts but 3"):
        engine.generate(["a", "b"], each)
    assert len(engine.generate(["a"])[0].token_ids) <= 16
    assert engine.generate([]) == []


def test_generate_names_the_prompt_that_can_not_run_and_leaves_nothing_behind(engine):
    prompts = ["fine", "", "x" * 500]
    with pytest.raises(ValueError, match=r"prompt 1 can't be run \(empty_prompt\)"):
        engine.generate(prompts, SamplingParams(max_tokens=50))
    assert not engine.has_work
    with pytest.raises(ValueError, match=r"prompt 0 .*500 tokens"):
        engine.generate(prompts[2])
    assert len(engine.generate("fine")) == 1


def test_chat_takes_conversations(fakes, engine):
    messages = [{"role": "user", "content": "hello"}]
    ids = tuple(engine.tokenizer.apply_chat_template(messages))
    (single,) = engine.chat(messages, SamplingParams(max_tokens=6))
    assert fakes.without_cost(single) == expected(fakes, engine, 0, ids, SamplingParams(max_tokens=6))
    assert len(engine.chat([messages, messages])) == 2
    with pytest.raises(ValueError, match="chat_template"):
        engine.chat([{"content": "?"}])


def test_run_streams_without_end_reads_only_a_window_ahead_and_can_be_left(fakes, engine):
    read = 0
    done = 0

    def source():
        nonlocal read
        for index in itertools.count():
            read += 1
            yield Request(index, (1 + index % 7, 2, 3), SamplingParams(max_tokens=3))

    with closing(engine.run(source(), window=20)) as items:
        for item in items:
            done += 1
            assert isinstance(item, Completion)
            assert read - done <= 20 + 8 + 8  # the window, the batch, and one step's completions
            if done == 500:
                break
    assert not engine.has_work and engine.stats.running == 0 and engine.stats.kv_blocks_used == 0


def test_run_keeps_the_batch_full(fakes, engine):
    requests = (Request(i, (i % 20, 3), SamplingParams(max_tokens=10, ignore_eos=True)) for i in range(200))
    assert sum(1 for _ in engine.run(requests, window=16)) == 200
    assert engine.stats.steps < 200 * 10 / 8 * 1.15


def test_run_yields_rejections_among_completions(engine):
    requests = [Request(i, () if i % 3 else (1, 2)) for i in range(100)]
    items = list(engine.run(requests, window=4))
    assert sorted(i.index for i in items if isinstance(i, Rejection)) == [i for i in range(100) if i % 3]
    assert len(items) == 100


def test_run_of_nothing_but_rejections_reads_only_a_window_ahead(engine):
    read = itertools.count()
    source = (Request(next(read), ()) for _ in range(1000))
    for done, _ in enumerate(engine.run(source, window=10), 1):
        if done == 50:
            break
    assert next(read) < 70


def test_run_drops_everything_if_its_source_fails(engine):
    def source():
        yield from (Request(i, (1, 2), SamplingParams(max_tokens=50)) for i in range(40))
        raise OSError("the input is gone")

    with pytest.raises(OSError, match="gone"):
        list(engine.run(source(), window=16))
    assert not engine.has_work


def test_run_refuses_a_busy_engine(engine):
    engine.add([Request(0, (1, 2))])
    with pytest.raises(RuntimeError, match="busy"):
        next(engine.run([Request(1, (1, 2))]))


def test_answers_do_not_depend_on_the_window_or_the_engine(fakes):
    rng = random.Random(5)
    requests = [
        Request(
            i,
            tuple(rng.randrange(20) for _ in range(rng.randrange(1, 40))),
            SamplingParams(max_tokens=12, temperature=1.0),
        )
        for i in range(60)
    ]
    outcomes = []
    for window, settings in (
        (1, {}),
        (7, {"prefix_cache": False}),
        (60, {"max_batch_tokens": 3, "steps_in_flight": 4}),
    ):
        items = make_engine(fakes, **settings).run(requests, window)
        outcomes.append({item.index: fakes.without_cost(item) for item in items})
    assert outcomes[0] == outcomes[1] == outcomes[2] and len(outcomes[0]) == 60


def test_a_caller_with_a_loop_of_its_own_can_stop_and_go_on_elsewhere(fakes, engine):
    requests = [Request(i, (i, 2, 3), SamplingParams(max_tokens=30, ignore_eos=True)) for i in range(4)]
    engine.add(requests)
    items = []
    for _ in range(10):
        items += engine.step()
    items += engine.settle()
    carried = {index: decoded for index, _, decoded in engine.in_flight()}
    assert items == [] and len(carried) == 4 and all(len(d.token_ids) == 10 for d in carried.values())
    for index in carried:
        engine.drop(index)
    assert not engine.has_work

    other = make_engine(fakes)
    other.add([replace(r, resume={0: carried[r.index]}) for r in requests])
    while other.has_work:
        items += other.step()
    assert [fakes.without_cost(i) for i in sorted(items, key=lambda item: item.index)] == [
        expected(fakes, engine, r.index, r.prompt, r.sampling) for r in requests
    ]


def test_closing_closes_the_runner(engine):
    with engine as entered:
        assert entered is engine
    assert engine.runner.closed


def test_an_unknown_setting_and_one_out_of_range_are_named():
    with pytest.raises(TypeError, match="max_batch_size"):
        Engine("model", max_batch_size=3)
    with pytest.raises(ValueError, match="window is 0"):
        Engine("model", window=0)


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_while_a_model_loads(monkeypatch, enabled) -> None:
    inside = []

    def failing_load(config):
        inside.append(gc.isenabled())
        raise ModelError("no such model")

    monkeypatch.setattr("batchinfer.engine.load.load", failing_load)
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ModelError):
            Engine("model")
        assert inside == [False]
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
