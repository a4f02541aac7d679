"""The columns of parts, and samples in storage: what was finished or in flight comes back as it was."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.engine.types import Completion, Decoded, SamplingParams, TokenLogprobs
from batchinfer.jobs.columns import output_schema, part_table, passed_columns, token_usd
from batchinfer.jobs.records import Failure
from batchinfer.jobs.samples import (
    NOTHING,
    Charge,
    Finished,
    Flight,
    Partial,
    SampleKey,
    charges_after,
    finished_from_bytes,
    finished_to_bytes,
    inflight_from_bytes,
    inflight_to_bytes,
)
from batchinfer.jobs.suspects import Suspicion
from batchinfer.jobs.types import JobError

PASSED = pa.schema([("id", pa.int64()), ("tags", pa.list_(pa.string()))])

counts = st.integers(0, 2**40)
logprobs = st.builds(
    TokenLogprobs,
    st.floats(-100, 0),
    st.lists(st.tuples(st.integers(0, 10**5), st.floats(-100, 0)), max_size=2).map(tuple),
)
charges = st.builds(
    Charge,
    worker=st.sampled_from(["a", "b"]),
    usd_per_hour=st.none() | st.floats(0, 100),
    prefill_ns=counts,
    decode_ns=counts,
    tokens=st.integers(0, 9),
)
decoded = st.builds(
    Decoded,
    token_ids=st.lists(st.integers(0, 10**5), max_size=3).map(tuple),
    token_ns=st.lists(counts, max_size=3).map(tuple),
    prefill_ns=counts,
    logprobs=st.lists(logprobs, max_size=3).map(tuple),
)
completions = st.builds(
    Completion,
    index=st.integers(0, 2**50),
    sample_index=st.integers(0, 3),
    text=st.text(max_size=5),
    token_ids=st.lists(st.integers(0, 10**5), max_size=3).map(tuple),
    finish_reason=st.sampled_from(["stop", "length"]),
    prompt_tokens=st.integers(0, 10**6),
    cached_tokens=st.integers(0, 10**6),
    prefill_ns=counts,
    token_ns=st.lists(counts, max_size=3).map(tuple),
    logprobs=st.none() | st.lists(logprobs, max_size=3).map(tuple),
    prompt_logprobs=st.none() | st.lists(st.none() | logprobs, max_size=3).map(tuple),
)


@settings(deadline=None)
@given(
    st.lists(st.builds(Finished, completions, st.lists(charges, max_size=2).map(tuple)), max_size=3),
    st.lists(st.builds(Failure, counts, st.text(max_size=3), st.text(max_size=3)), max_size=2),
)
def test_finished_samples_and_failures_survive_storage(
    samples: list[Finished], failures: list[Failure]
) -> None:
    assert finished_from_bytes(finished_to_bytes(samples, failures)) == (samples, failures)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.builds(SampleKey, counts, st.integers(0, 3)),
        st.builds(Partial, decoded, st.lists(charges, max_size=2).map(tuple)),
        max_size=3,
    )
)
def test_samples_in_flight_survive_storage(partials: dict[SampleKey, Partial]) -> None:
    suspicion = Suspicion(((4, 5), (6,)), {6: 2})
    flight = Flight(partials, frozenset({4, 7}), suspicion)
    assert inflight_from_bytes(inflight_to_bytes(flight)) == flight


@given(st.lists(st.tuples(st.sampled_from("abc"), counts, st.lists(counts, max_size=3)), max_size=5))
def test_charges_add_up_over_any_number_of_owners(owners: list[tuple[str, int, list[int]]]) -> None:
    state, spent = NOTHING, dict.fromkeys("abc", 0)
    for worker, prefill, token_ns in owners:
        total = Decoded(
            token_ids=(0,) * (len(state.decoded.token_ids) + len(token_ns)),
            token_ns=(*state.decoded.token_ns, *token_ns),
            prefill_ns=state.decoded.prefill_ns + prefill,
        )
        found = charges_after(state, worker, 1.0, total.prefill_ns, total.token_ns)
        state = Partial(total, found)
        spent[worker] += prefill + sum(token_ns)
    assert sum(charge.prefill_ns for charge in state.charges) == state.decoded.prefill_ns
    assert sum(charge.decode_ns for charge in state.charges) == sum(state.decoded.token_ns)
    assert sum(charge.tokens for charge in state.charges) == len(state.decoded.token_ns)
    for worker in "abc":
        assert spent[worker] == sum(item.nanoseconds for item in state.charges if item.worker == worker)


def finished(row: int, sample: int = 0) -> Finished:
    completion = Completion(
        index=row,
        sample_index=sample,
        text="é",
        token_ids=(5, 6),
        finish_reason="stop",
        prompt_tokens=3,
        cached_tokens=1,
        prefill_ns=1_000,
        token_ns=(10_000, 20_000),
        logprobs=(TokenLogprobs(-0.5, ((5, -0.5), (7, -1.0))), TokenLogprobs(-0.25, ((6, -0.25),))),
        prompt_logprobs=(None, TokenLogprobs(-2.0, ((1, -2.0),))),
    )
    return Finished(completion, (Charge("a", 3.6, 1_000, 10_000, 1), Charge("b", 36.0, 0, 20_000, 1)))


def test_every_column_of_the_contract_is_there() -> None:
    sampling = SamplingParams(n=2, logprobs=2, prompt_logprobs=1)
    schema = output_schema(PASSED, sampling, True)
    assert schema.names == [
        *PASSED.names,
        *("row_index", "sample_index", "completion", "finish_reason"),
        *("prompt_tokens", "cached_tokens", "completion_tokens", "prefill_ns", "decode_ns"),
        *("cost_usd", "prefill_cost_usd", "decode_cost_usd", "seconds"),
        *("token_ids", "token_logprobs", "token_cost_usd", "top_logprobs", "prompt_logprobs"),
    ]
    passed = pa.table({"id": [4, 4], "tags": [["x"], ["x"]]}, schema=PASSED)
    [first, second] = part_table(schema, passed, [finished(4), finished(4, 1)]).to_pylist()
    assert second["sample_index"] == 1
    assert first | {"cost_usd": 0, "decode_cost_usd": 0, "prefill_cost_usd": 0, "token_cost_usd": 0} == {
        "id": 4,
        "tags": ["x"],
        "row_index": 4,
        "sample_index": 0,
        "completion": "é",
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "cached_tokens": 1,
        "completion_tokens": 2,
        "prefill_ns": 1_000,
        "decode_ns": 30_000,
        "cost_usd": 0,
        "prefill_cost_usd": 0,
        "decode_cost_usd": 0,
        "seconds": 31e-6,
        "token_ids": [5, 6],
        "token_logprobs": [-0.5, -0.25],
        "token_cost_usd": 0,
        "top_logprobs": [
            [{"token_id": 5, "logprob": -0.5}, {"token_id": 7, "logprob": -1.0}],
            [{"token_id": 6, "logprob": -0.25}],
        ],
        "prompt_logprobs": [None, {"logprob": -2.0, "top": [{"token_id": 1, "logprob": -2.0}]}],
    }
    # Each token at the price of the worker that decoded it: 10 µs at 3.6, 20 µs at 36 USD an hour.
    assert first["token_cost_usd"] == pytest.approx([1e-8, 2e-7])
    assert first["decode_cost_usd"] == pytest.approx(2.1e-7)
    assert first["cost_usd"] == pytest.approx(first["prefill_cost_usd"] + first["decode_cost_usd"])


def test_plain_jobs_have_no_columns_that_they_did_not_ask_for() -> None:
    schema = output_schema(PASSED, SamplingParams(), False)
    assert not {"sample_index", "token_ids", "top_logprobs", "prompt_logprobs"} & set(schema.names)
    assert passed_columns(schema, SamplingParams(), False) == PASSED
    empty = part_table(schema, PASSED.empty_table(), [])
    assert empty.num_rows == 0 and empty.schema == schema


def test_costs_are_empty_without_a_price() -> None:
    sample = finished(1)
    unpriced = Finished(sample.completion, (Charge("a", None, 1_000, 30_000, 2),))
    assert token_usd(unpriced) is None
    schema = output_schema(pa.schema([]), SamplingParams(), False)
    [row] = part_table(schema, pa.table({}), [unpriced]).to_pylist()
    assert (row["cost_usd"], row["seconds"]) == (None, 31e-6)


@pytest.mark.parametrize("name", ["completion", "row_index", "prefill_ns"])
def test_a_column_that_would_collide_is_refused_with_both_names(name: str) -> None:
    with pytest.raises(JobError, match=f"the input's column {name} .* the output's column {name}"):
        output_schema(pa.schema([(name, pa.string())]), SamplingParams(), False)
    output_schema(pa.schema([("sample_index", pa.int8())]), SamplingParams(), False)
