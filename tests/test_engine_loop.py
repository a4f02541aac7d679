"""The engine loop on a runner whose tokens are hashes of its KV cache's real content."""

import random
from dataclasses import replace

import pytest

from batchinfer.engine.config import EngineConfig
from batchinfer.engine.loop import EngineLoop
from batchinfer.engine.types import (
    Completion,
    Decoded,
    EngineError,
    Rejection,
    Request,
    SamplingParams,
    TokenLogprobs,
)


def make_loop(fakes, *, clock_seed=0, runner=None, **settings):
    """A loop and its runner; ``settings`` are EngineConfig's, ``runner`` the fake runner's fields."""
    config = EngineConfig(model="fake", **{"max_sequences": 8, "max_batch_tokens": 32, **settings})
    clock = fakes.FakeClock(clock_seed)
    fake = fakes.FakeRunner(
        **{"steps_in_flight": config.steps_in_flight or 1, "clock": clock, **(runner or {})}
    )
    return EngineLoop(fake, fakes.FakeTokenizer(), config, clock), fake


def finish(loop, requests=(), *, check=True, limit=20_000):
    """Run to the end, all invariants checked after each step: items in the order they finished."""
    loop.add(list(requests))
    items = []
    for _ in range(limit):
        if not loop.has_work:
            break
        items += loop.step()
        if check:
            loop.check()
    assert not loop.has_work, "it does not end"
    return items


def assert_right(fakes, runner, requests, items):
    """Each sample once, with exactly the tokens, text and reason that a direct computation gives."""
    found = {(item.index, item.sample_index): item for item in items}
    assert len(found) == len(items)
    expected = {}
    for request in requests:
        samples = range(request.sampling.n) if request.samples is None else request.samples
        for sample in samples:
            expected[request.index, sample] = fakes.expected_completion(
                request, list(request.prompt), sample, runner.max_context
            )
    assert {key: fakes.without_cost(item) for key, item in found.items()} == expected
    for item in items:
        assert len(item.token_ns) == len(item.token_ids)


def assert_conserved(loop, items, imported_ns=0):
    """Charged to rows + waste + idle is the whole time, to the nanosecond; nothing is left in the pool."""
    stats = loop.stats
    charged = sum(item.prefill_ns + item.decode_ns for item in items if isinstance(item, Completion))
    assert charged - imported_ns == stats.rows_ns
    assert stats.rows_ns + stats.waste_ns + stats.idle_ns == stats.accounted_until_ns - stats.started_ns
    assert stats.kv_blocks_used == 0 and stats.running == 0 and stats.waiting == 0


def random_requests(rng, count, vocab, *, longest_prompt, longest_answer, stops=True):
    stems = [tuple(rng.randrange(vocab) for _ in range(rng.randrange(1, 20))) for _ in range(3)]
    requests = []
    for index in range(count):
        prompt = rng.choice([(), *stems]) + tuple(
            rng.randrange(vocab) for _ in range(rng.randrange(1, longest_prompt))
        )
        if requests and rng.random() < 0.2:
            prompt = rng.choice(requests).prompt
        max_tokens = rng.choice([1, 2, rng.randrange(1, longest_answer), longest_answer, None])
        sampling = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=rng.choice([0, 0, rng.randrange(0, (max_tokens or 5) + 1)]),
            temperature=rng.choice([0.0, 1.0]),
            seed=rng.randrange(3),
            stop=tuple(rng.sample(["ab", "bca", "c", "abc", "é", "xyz."], rng.choice([0, 0, 1, 2])))
            if stops
            else (),
            stop_token_ids=tuple(rng.sample(range(vocab), rng.choice([0, 0, 1]))),
            include_stop=rng.random() < 0.3,
            ignore_eos=rng.random() < 0.5,
            n=rng.choice([1, 1, 1, 2, 3]),
            logprobs=rng.choice([None, None, 0, 2]),
            prompt_logprobs=rng.choice([None, None, None, 0, 2]),
        )
        requests.append(Request(index, prompt, sampling))
    rng.shuffle(requests)
    return requests


def random_engine(fakes, rng):
    block_size = rng.choice([1, 2, 4, 5, 16])
    max_context = rng.choice([24, 48, 80])
    smallest = -(-max_context // block_size)
    return make_loop(
        fakes,
        clock_seed=rng.randrange(1000),
        max_sequences=rng.choice([1, 2, 5, 16]),
        max_batch_tokens=rng.choice([1, 2, 7, 32, 256]),
        prefix_cache=rng.random() < 0.7,
        steps_in_flight=rng.choice([1, 1, 2, 3, 4]),
        runner={
            "fresh_blocks_cost": rng.choice([False, True]),
            "block_size": block_size,
            "max_context": max_context,
            "num_blocks": rng.choice([smallest, smallest + 2, 2 * smallest, 10 * smallest]),
            "max_rows": 16,
            "seed": rng.randrange(1000),
        },
    )


@pytest.mark.parametrize("seed", range(300))
def test_random_requests_give_exactly_what_direct_computation_gives(fakes, seed):
    rng = random.Random(seed)
    loop, runner = random_engine(fakes, rng)
    requests = random_requests(
        rng,
        rng.randrange(1, 14),
        fakes.FakeTokenizer.vocab_size,
        longest_prompt=rng.choice([2, 12, runner.max_context // 2 - 10]) + 2,
        longest_answer=rng.choice([3, 12, 30]),
    )
    requests = [request for request in requests if len(request.prompt) < runner.max_context]
    cut = rng.randrange(len(requests) + 1)
    loop.add(requests[:cut])
    items = []
    for _ in range(rng.randrange(10)):
        items += loop.step()
        loop.check()
    items += finish(loop, requests[cut:])
    assert_right(fakes, runner, requests, items)
    assert_conserved(loop, items)
    by_key = {request.index: request for request in requests}
    for item in items:
        sampling = by_key[item.index].sampling
        if sampling.logprobs is None:
            assert item.logprobs is None
        else:
            assert item.logprobs == tuple(
                TokenLogprobs(
                    fakes.logprob(t), tuple((t + k, -(t + k) / 4) for k in range(sampling.logprobs))
                )
                for t in item.token_ids
            )
        if sampling.prompt_logprobs is None:
            assert item.prompt_logprobs is None
        else:
            assert item.prompt_logprobs is not None and item.prompt_logprobs[0] is None
            prompt = by_key[item.index].prompt
            assert [entry.logprob for entry in item.prompt_logprobs[1:]] == [
                fakes.logprob(token) for token in prompt[1:]
            ]
            assert item.cached_tokens == 0


@pytest.mark.parametrize("seed", range(60))
def test_dropping_requests_and_moving_to_other_engines_changes_no_answer(fakes, seed):
    rng = random.Random(1000 + seed)
    loop, runner = random_engine(fakes, rng)
    requests = random_requests(rng, 8, fakes.FakeTokenizer.vocab_size, longest_prompt=12, longest_answer=20)
    requests = [request for request in requests if len(request.prompt) < 24]
    dropped = {request.index for request in requests if rng.random() < 0.2 * (seed % 2)}
    items, rows_ns = [], 0
    pending = {request.index: request for request in requests}
    for engine in range(4):
        loop.add(list(pending.values()))
        for _ in range(10_000 if engine == 3 else rng.randrange(12)):
            if not loop.has_work:
                break
            items += loop.step()
            loop.check()
            for index in dropped & pending.keys():
                if rng.random() < 0.1:
                    loop.drop(index)
                    del pending[index]
                    loop.check()
        items += loop.settle()
        loop.check()
        rows_ns += loop.stats.rows_ns
        exported = {(index, sample): decoded for index, sample, decoded in loop.in_flight()}
        finished = {(item.index, item.sample_index) for item in items}
        moving = {}
        for index, request in pending.items():
            samples = request.samples if request.samples is not None else range(request.sampling.n)
            left = tuple(sample for sample in samples if (index, sample) not in finished)
            if left:
                resume = {s: exported[index, s] for s in left if (index, s) in exported}
                moving[index] = replace(request, samples=left, resume=resume)
        pending = moving
        fresh, runner = make_loop(
            fakes,
            steps_in_flight=rng.choice([1, 2, 3]),
            runner={"max_context": runner.max_context, "num_blocks": 200, "seed": seed},
        )
        loop = fresh if engine < 3 else loop
    kept = [request for request in requests if request.index not in dropped]
    wanted = [item for item in items if item.index not in dropped]
    assert_right(fakes, runner, kept, wanted)
    if not dropped:
        assert rows_ns == sum(item.prefill_ns + item.decode_ns for item in items)


PROMPT = (1, 2, 3, 4, 5, 6, 7, 8)


def complete(fakes, prompt, sampling, *, runner=None, **settings):
    """One request, alone: its completion, its loop."""
    loop, fake = make_loop(fakes, runner=runner, **settings)
    request = Request(7, prompt, sampling)
    items = finish(loop, [request])
    assert_right(fakes, fake, [request], items)
    assert_conserved(loop, items)
    return items, loop, fake


def test_fresh_blocks_are_spared_where_they_cost_and_shared_prefixes_stay(fakes):
    """The last prompts begin as the first ones do, long after others took as many blocks many times."""
    common = (7, 8) * 8
    prompts = [(*(common if i not in range(3, 57) else ()), i % 6, i // 6, 5, 4, 3, 2) for i in range(60)]
    requests = [Request(i, prompt, SamplingParams(max_tokens=6)) for i, prompt in enumerate(prompts)]
    fresh, cached = [], []
    for cost in (False, True):
        loop, runner = make_loop(
            fakes,
            max_sequences=2,
            runner={"fresh_blocks_cost": cost, "block_size": 4, "num_blocks": 400},
        )
        items = [
            item for part in (requests[:3], requests[3:57], requests[57:]) for item in finish(loop, part)
        ]
        assert_right(fakes, runner, requests, items)
        fresh.append(loop._scheduler.pool.num_fresh)
        cached.append(sum(item.cached_tokens for item in items))
    assert fresh[0] < 330 < 370 < fresh[1], fresh
    assert cached[0] == cached[1] == 5 * 16, cached


@pytest.mark.parametrize("size", [1, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_prompts_around_the_size_of_a_block(fakes, size, steps_in_flight):
    items, loop, _ = complete(
        fakes, tuple(range(1, size + 1)), SamplingParams(max_tokens=9), steps_in_flight=steps_in_flight
    )
    assert items[0].prompt_tokens == size and loop.stats.prompt_tokens == size


@pytest.mark.parametrize("steps_in_flight", [1, 2, 4])
def test_max_tokens_one_takes_one_step_and_no_over_run(fakes, steps_in_flight):
    _, loop, runner = complete(
        fakes, PROMPT, SamplingParams(max_tokens=1, ignore_eos=True), steps_in_flight=steps_in_flight
    )
    assert runner.steps == 1 and loop.stats.waste_ns == 0 and loop.stats.generated_tokens == 1


@pytest.mark.parametrize("steps_in_flight", [1, 2, 4])
def test_a_known_length_is_never_over_run(fakes, steps_in_flight):
    _, loop, runner = complete(
        fakes, PROMPT, SamplingParams(max_tokens=20, ignore_eos=True), steps_in_flight=steps_in_flight
    )
    assert runner.computed_tokens == len(PROMPT) + 19 and loop.stats.waste_ns == 0


def first_eos_prompt(fakes):
    """A prompt after which end-of-sequence comes first."""
    for prompt in ((a, b, c) for a in range(20) for b in range(20) for c in range(20)):
        if fakes.next_token(prompt, SamplingParams(), 0, 0) == fakes.EOS:
            return prompt
    raise AssertionError


def test_end_of_sequence_on_the_first_token(fakes):
    items, _, _ = complete(fakes, first_eos_prompt(fakes), SamplingParams(max_tokens=5))
    assert items[0].token_ids == (fakes.EOS,)
    assert items[0].text == "" and items[0].finish_reason == "stop"


def test_min_tokens_keeps_end_of_sequence_from_ending(fakes):
    items, _, _ = complete(fakes, first_eos_prompt(fakes), SamplingParams(max_tokens=5, min_tokens=2))
    assert len(items[0].token_ids) >= 2


@pytest.mark.parametrize("steps_in_flight", [2, 3, 4])
def test_over_run_tokens_are_dropped_and_their_time_is_waste(fakes, steps_in_flight):
    prompt = first_eos_prompt(fakes)
    items, loop, runner = complete(
        fakes, prompt, SamplingParams(max_tokens=50), steps_in_flight=steps_in_flight
    )
    assert runner.steps == steps_in_flight and len(items[0].token_ids) == 1
    assert loop.stats.waste_ns > 0 and loop.stats.generated_tokens == 1


def test_a_finished_sequences_blocks_wait_for_the_step_that_over_runs_it(fakes):
    loop, _ = make_loop(fakes, steps_in_flight=2, prefix_cache=False, runner={"block_size": 1})
    loop.add([Request(0, first_eos_prompt(fakes), SamplingParams(max_tokens=50))])
    assert loop.step() == []
    (item,) = loop.step()
    assert item.finish_reason == "stop"
    assert loop.stats.running == 0 and loop.stats.kv_blocks_used == 1
    loop.check()
    assert loop.step() == [] and loop.stats.kv_blocks_used == 0


def test_the_context_limit_ends_a_sequence(fakes):
    items, _, _ = complete(
        fakes, PROMPT, SamplingParams(max_tokens=None, ignore_eos=True), runner={"max_context": 20}
    )
    assert len(items[0].token_ids) == 12 and items[0].finish_reason == "length"


@pytest.mark.parametrize("max_batch_tokens", [4, 64])
def test_samples_compute_their_prompt_once(fakes, max_batch_tokens):
    loop, runner = make_loop(fakes, max_batch_tokens=max_batch_tokens)
    prompt = tuple(range(1, 15))  # three full blocks and a half
    sampling = SamplingParams(max_tokens=3, n=4, temperature=1.0, ignore_eos=True)
    items = finish(loop, [Request(0, prompt, sampling)])
    assert_right(fakes, runner, [Request(0, prompt, sampling)], items)
    assert sorted(item.cached_tokens for item in items) == [0, 12, 12, 12]
    assert loop.stats.prompt_tokens == 14 + 3 * 2 and loop.stats.cached_tokens == 36
    assert loop.stats.waste_ns == 0 and loop.stats.recomputed_tokens == 0


@pytest.mark.parametrize("max_batch_tokens", [8, 200])
def test_requests_that_share_instructions_wait_for_whoever_computes_them(fakes, max_batch_tokens):
    loop, runner = make_loop(fakes, max_batch_tokens=max_batch_tokens)
    requests = [
        Request(i, (*range(1, 17), i, i), SamplingParams(max_tokens=4, ignore_eos=True)) for i in range(6)
    ]
    items = finish(loop, requests)
    assert_right(fakes, runner, requests, items)
    assert loop.stats.prompt_tokens == 16 + 6 * 2 and loop.stats.cached_tokens == 5 * 16


def test_whoever_waits_for_a_prefix_goes_on_when_the_one_that_computes_it_is_dropped(fakes):
    loop, runner = make_loop(fakes, steps_in_flight=2)
    requests = [Request(i, (*PROMPT, i), SamplingParams(max_tokens=4, ignore_eos=True)) for i in range(3)]
    loop.add(requests)
    assert loop.step() == [] and loop.stats.running == 1 and loop.stats.waiting == 2
    loop.drop(0)
    loop.check()
    assert_right(fakes, runner, requests[1:], finish(loop))


def test_a_whole_cached_prompt_is_never_matched_entirely(fakes):
    loop, _ = make_loop(fakes)
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    finish(loop, [Request(0, PROMPT, sampling)])
    (item,) = finish(loop, [Request(1, PROMPT, sampling)])
    assert item.cached_tokens == 4


def test_decoded_tokens_are_found_in_the_prefix_cache(fakes):
    loop, _ = make_loop(fakes)
    sampling = SamplingParams(max_tokens=9, ignore_eos=True)
    (first,) = finish(loop, [Request(0, PROMPT, sampling)])
    (item,) = finish(loop, [Request(1, PROMPT + first.token_ids, sampling)])
    assert item.cached_tokens == 16


def test_rows_with_prompt_logprobs_do_not_read_the_prefix_cache(fakes):
    loop, _ = make_loop(fakes)
    finish(loop, [Request(0, PROMPT, SamplingParams(max_tokens=2))])
    (item,) = finish(loop, [Request(1, PROMPT, SamplingParams(max_tokens=2, prompt_logprobs=1))])
    assert item.cached_tokens == 0 and len(item.prompt_logprobs) == len(PROMPT)


def thirsty(count=4):
    """Requests that may stop soon for all the engine knows, but don't: the forecast is too low."""
    sampling = SamplingParams(max_tokens=40, stop_token_ids=(10**6,), ignore_eos=True)
    return [Request(i, (i + 1, 2, 3), sampling) for i in range(count)]


def make_thirsty_loop(fakes, **settings):
    loop, runner = make_loop(fakes, runner={"num_blocks": 16, "max_context": 64}, **settings)
    loop._scheduler._generated = 1  # expect short answers
    return loop, runner


@pytest.mark.parametrize("steps_in_flight", [1, 2, 3, 4])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_preempted_sequences_come_back_and_their_repeated_work_is_waste(
    fakes, steps_in_flight, prefix_cache
):
    loop, runner = make_thirsty_loop(fakes, steps_in_flight=steps_in_flight, prefix_cache=prefix_cache)
    items = finish(loop, thirsty())
    assert_right(fakes, runner, thirsty(), items)
    assert_conserved(loop, items)
    stats = loop.stats
    assert stats.preemptions > 0 and stats.recomputed_tokens > 0 and stats.waste_ns > 0
    assert all(item.cached_tokens == 0 for item in items) and stats.cached_tokens == 0
    assert stats.prompt_tokens == 4 * 3
    useful = 4 * (3 + 39)
    assert runner.computed_tokens == useful + stats.recomputed_tokens


def test_the_oldest_is_never_preempted_though_it_has_computed_least(fakes, monkeypatch):
    loop, runner = make_thirsty_loop(fakes)
    scheduler = loop._scheduler
    preempt, victims = scheduler._preempt, []

    def spy(sequence):
        state = scheduler._rows
        running = [state.at(row) for row in state.by_age().tolist()]
        assert sequence.ticket > min(s.ticket for s in running)
        candidates = [s for s in running if s.ticket > min(r.ticket for r in running)]
        assert state.planned[sequence.row] == min(state.planned[s.row] for s in candidates)
        victims.append(sequence.index)
        preempt(sequence)

    monkeypatch.setattr(scheduler, "_preempt", spy)
    sampling = thirsty(1)[0].sampling
    requests = [Request(i, (i,) * (1 if i == 0 else 12), sampling) for i in range(4)]
    loop.add(requests[:1])  # alone, so that it is the oldest
    items = finish(loop, requests[1:])
    assert_right(fakes, runner, requests, items)
    assert victims and 0 not in victims


def test_no_more_are_preempted_than_what_their_steps_in_flight_will_give_back(fakes, monkeypatch):
    monkeypatch.setattr("batchinfer.engine.scheduler.peak_blocks", lambda *args: 0)
    loop, runner = make_loop(
        fakes, steps_in_flight=2, runner={"block_size": 16, "num_blocks": 4, "max_context": 64}
    )
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    # One block each, until the first needs a second one; the others' are being written at that time.
    requests = [Request(i, (i,) * size, sampling) for i, size in enumerate((15, 3, 2, 1))]
    items = finish(loop, requests)
    assert_right(fakes, runner, requests, items)
    assert loop.stats.preemptions == 1


@pytest.mark.parametrize("settle", [False, True])
def test_a_sequence_preempted_while_its_token_is_in_flight_keeps_the_token(fakes, settle):
    loop, runner = make_thirsty_loop(fakes, steps_in_flight=3)
    scheduler = loop._scheduler
    requests = thirsty(2)
    loop.add(requests)
    for _ in range(8):
        loop.step()
    victim = loop._unfinished[1][0]
    known, in_flight = len(victim.tokens), victim.in_flight
    assert in_flight == 2
    scheduler._preempt(victim)
    scheduler.check()
    items = []
    if settle:
        items += loop.settle()
        assert len(victim.tokens) == known + in_flight
    items += finish(loop)
    assert_right(fakes, runner, requests, items)
    assert_conserved(loop, items)


@pytest.mark.parametrize("shared", [0, 32])
def test_known_lengths_are_admitted_without_preemption(fakes, shared):
    for seed in range(20):
        rng = random.Random(seed)
        stem = tuple(rng.randrange(20) for _ in range(shared))
        loop, runner = make_loop(
            fakes,
            max_sequences=16,
            max_batch_tokens=256,
            prefix_cache=shared > 0,
            runner={"num_blocks": 24 + shared // 4, "max_rows": 16, "max_context": 130},
        )
        requests = [
            Request(
                i,
                stem + tuple(rng.randrange(20) for _ in range(rng.randrange(1, 30))),
                SamplingParams(max_tokens=rng.randrange(1, 60), ignore_eos=True),
            )
            for i in range(30)
        ]
        items = finish(loop, requests)
        assert_right(fakes, runner, requests, items)
        assert loop.stats.preemptions == 0


@pytest.mark.parametrize("include_stop", [False, True])
def test_a_stop_string_across_tokens_is_found_and_cut(fakes, include_stop):
    plain, _, _ = complete(fakes, PROMPT, SamplingParams(max_tokens=30, ignore_eos=True))
    text = plain[0].text
    stop = text[7:12]
    sampling = SamplingParams(max_tokens=30, ignore_eos=True, stop=(stop,), include_stop=include_stop)
    items, _, _ = complete(fakes, PROMPT, sampling)
    end = text.index(stop) + (len(stop) if include_stop else 0)
    assert items[0].text == text[:end] and items[0].finish_reason == "stop"
    assert len(items[0].token_ids) < 30


def test_resuming_in_the_middle_equals_an_undisturbed_run(fakes):
    sampling = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=1, prompt_logprobs=1, stop=("zz",))
    (whole,), _, _ = complete(fakes, PROMPT, sampling)
    for stop in range(len(whole.token_ids) + 1):
        done = Decoded(
            token_ids=whole.token_ids[:stop],
            token_ns=tuple(range(1000, 1000 + stop)),
            prefill_ns=77,
            logprobs=whole.logprobs[:stop],
        )
        loop, _ = make_loop(fakes, max_batch_tokens=3)
        (item,) = finish(loop, [Request(7, PROMPT, sampling, resume={0: done})])
        assert fakes.without_cost(item) == fakes.without_cost(whole)
        assert item.logprobs == whole.logprobs
        assert item.token_ns[:stop] == done.token_ns
        assert_conserved(loop, [item], imported_ns=77 + sum(done.token_ns))
        if 0 < stop < len(whole.token_ids):
            # Everything but the last token's position was computed before: only that is new work.
            assert item.prefill_ns == 77 and loop.stats.waste_ns > 0
            assert loop.stats.recomputed_tokens == len(PROMPT) + stop - 1
            assert item.prompt_logprobs == whole.prompt_logprobs
    assert loop.stats.steps == 0  # the last one was finished already


def test_moving_hands_over_every_nanosecond(fakes):
    sampling = SamplingParams(max_tokens=20, ignore_eos=True)
    loop, _ = make_loop(fakes, max_batch_tokens=6, max_sequences=2, steps_in_flight=2)
    requests = [Request(i, (i, *PROMPT), sampling) for i in range(4)]
    items = []
    loop.add(requests)
    for _ in range(9):
        items += loop.step()
    items += loop.settle()
    assert items == []
    exported = list(loop.in_flight())
    assert loop.stats.rows_ns == sum(d.prefill_ns + sum(d.token_ns) for _, _, d in exported)
    assert any(not decoded.token_ids for _, _, decoded in exported) or len(exported) < 4
    other, runner = make_loop(fakes)
    resume = {index: {sample: decoded} for index, sample, decoded in exported}
    moved = finish(other, [replace(r, resume=resume.get(r.index, {})) for r in requests])
    assert_right(fakes, runner, requests, moved)
    assert_conserved(other, moved, imported_ns=loop.stats.rows_ns)


def test_dropping_makes_waste_of_what_was_charged(fakes):
    loop, _ = make_loop(fakes, steps_in_flight=2)
    loop.add([Request(i, (i, *PROMPT), SamplingParams(max_tokens=20, ignore_eos=True)) for i in range(2)])
    for _ in range(5):
        loop.step()
    loop.drop(0)
    loop.check()
    loop.drop(99)
    items = finish(loop)
    assert [item.index for item in items] == [1]
    assert_conserved(loop, items)
    assert loop.stats.waste_ns > 0


def test_idle_is_the_time_that_the_caller_is_away_with_nothing_in_flight(fakes):
    for steps_in_flight in (1, 2):
        loop, runner = make_loop(fakes, steps_in_flight=steps_in_flight)
        runner.clock.now += 10**6
        loop.add([Request(0, PROMPT, SamplingParams(max_tokens=4, ignore_eos=True))])
        items = loop.step()
        assert loop.step() == [] and 10**6 <= loop.stats.idle_ns < 10**6 + 1000
        runner.clock.now += 10**6
        items += finish(loop)
        # With a step in flight the device may have worked meanwhile: the time is that step's.
        assert 10**6 * (3 - steps_in_flight) <= loop.stats.idle_ns < 10**6 * 2 + 2000
        assert_conserved(loop, items)


def test_work_between_steps_is_not_idle(fakes, monkeypatch):
    loop, runner = make_loop(fakes)

    def slow_decode(self, ids):
        runner.clock.now += 10**6
        return ""

    monkeypatch.setattr(fakes.FakeTokenizer, "decode", slow_decode)
    items = finish(
        loop, [Request(i, PROMPT, SamplingParams(max_tokens=i + 1, ignore_eos=True)) for i in range(3)]
    )
    assert_conserved(loop, items)
    assert loop.stats.idle_ns < 1000 and loop.stats.rows_ns > 2 * 10**6


def test_waste_is_zero_in_an_undisturbed_run(fakes):
    loop, _ = make_loop(fakes)
    requests = random_requests(random.Random(3), 10, 20, longest_prompt=20, longest_answer=10)
    finish(loop, requests)
    assert loop.stats.waste_ns == 0


def test_requests_that_cannot_run_are_rejected_with_a_code_and_a_reason(fakes):
    loop, _ = make_loop(fakes, runner={"num_blocks": 10, "max_context": 64})
    items = finish(
        loop,
        [
            Request(0, ()),
            Request(1, ""),
            Request(2, tuple([1] * 64)),
            Request(3, tuple([1] * 30), SamplingParams(max_tokens=20)),
            Request(4, (1, 999)),
            Request(5, (1, -1)),
            Request(6, [{"content": "no role"}]),
            Request(7, (1,), SamplingParams(logit_bias={999: 1.0})),
            Request(8, (1, 2), SamplingParams(max_tokens=1)),
            Request(9, tuple([1] * 31), SamplingParams(max_tokens=10)),
        ],
    )
    codes = {item.index: item.code for item in items if isinstance(item, Rejection)}
    assert codes == {
        0: "empty_prompt",
        1: "empty_prompt",
        2: "too_long",
        3: "too_long",
        4: "bad_token",
        5: "bad_token",
        6: "chat_template",
        7: "bad_token",
    }
    messages = {item.index: item.message for item in items if isinstance(item, Rejection)}
    assert "64 tokens" in messages[2] and "max_context" in messages[2]
    assert "KV cache holds 40 tokens" in messages[3] and "kv_bytes" in messages[3]
    assert {item.index for item in items if isinstance(item, Completion)} == {8, 9}


def test_a_sample_can_not_be_added_twice(fakes):
    loop, _ = make_loop(fakes)
    loop.add([Request(3, PROMPT)])
    with pytest.raises(ValueError, match="request 3, sample 0"):
        loop.add([Request(3, PROMPT)])
    assert len(finish(loop, [Request(3, PROMPT, SamplingParams(n=3), samples=(1, 2))])) == 3


def test_a_resume_that_contradicts_itself_is_refused(fakes):
    loop, _ = make_loop(fakes)
    with pytest.raises(ValueError, match="request 1 resumes sample 0"):
        loop.add([Request(1, PROMPT, resume={0: Decoded((1, 2), (5,))})])
    with pytest.raises(ValueError, match="request 1 asks for logprobs"):
        loop.add([Request(1, PROMPT, SamplingParams(logprobs=0), resume={0: Decoded((1,), (5,))})])
    assert not loop.has_work


def test_a_step_that_fails_stops_the_engine(fakes):
    loop, _ = make_loop(fakes, steps_in_flight=2, runner={"fail_at": 2})
    with pytest.raises(RuntimeError, match="on fire"):
        finish(loop, [Request(0, PROMPT, SamplingParams(max_tokens=20, ignore_eos=True))], check=False)
    with pytest.raises(EngineError, match="earlier step"):
        loop.step()


def test_results_do_not_depend_on_what_happens_to_be_ready(fakes):
    """The same plans are launched however late the steps run."""
    outcomes = set()
    for runner_seed in range(5):
        loop, runner = make_thirsty_loop(fakes, steps_in_flight=3)
        runner._random.seed(runner_seed)
        finish(loop, thirsty())
        outcomes.add((runner.steps, runner.computed_tokens, loop.stats.preemptions))
    assert len(outcomes) == 1
