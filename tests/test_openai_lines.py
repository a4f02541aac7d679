"""OpenAI batch lines: which rows they become, how their answers are sampled, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from batchinfer.connectors.openai import CHAT, COMPLETIONS, BadRequest, parse_line, schema
from batchinfer.connectors.readers import discover, read_batches, read_split, scan_input
from batchinfer.connectors.types import BadRow, StorageError
from batchinfer.engine.types import SamplingParams
from batchinfer.jobs import batch_requests
from batchinfer.jobs.batch_requests import read_request
from batchinfer.jobs.types import RowError

MESSAGES = [{"role": "user", "content": "Hi"}]


def line(url: str = CHAT, custom_id: Any = "r1", method: Any = "POST", **body: Any) -> dict[str, Any]:
    given = {"messages": MESSAGES} if url == CHAT else {"prompt": "Hi"}
    return {"custom_id": custom_id, "method": method, "url": url, "body": {"model": "m", **given, **body}}


def parsed(value: Any) -> Any:
    return parse_line(value if isinstance(value, bytes) else json.dumps(value).encode())


def requested(value: dict[str, Any], choice: int = 0, tokens: bool = False) -> Any:
    """The prompt and the sampling of one choice of a line."""
    columns = schema(logprobs=True)
    row = dict(zip(columns.names, parsed(value).values(choice, columns), strict=True))
    return read_request(row, tokens)


def sampled(value: dict[str, Any]) -> SamplingParams:
    sampling = requested(value)[1]
    assert isinstance(sampling, SamplingParams)
    return sampling


LINES = st.one_of(
    st.builds(
        lambda n, text: line(COMPLETIONS, custom_id=text, n=n),
        st.none() | st.integers(1, 4),
        st.text(st.characters(codec="utf-8"), max_size=5),
    ),
    st.builds(
        lambda prompts: line(COMPLETIONS, prompt=prompts, n=2),
        st.lists(st.just("a"), min_size=1, max_size=3),
    ),
    st.builds(lambda top: line(logprobs=True, top_logprobs=top), st.integers(0, 2)),
    st.builds(lambda: line(n=0)),
    st.just("no request"),
    st.just(""),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(LINES, max_size=12), st.sampled_from(["", ".gz"]), st.none() | st.integers(1, 5), st.booleans()
)
def test_every_choice_is_a_row_however_the_file_is_cut(
    tmp_path: Path, lines: list[Any], end: str, rows: int | None, open_end: bool
) -> None:
    text = "\n".join(item if isinstance(item, str) else json.dumps(item) for item in lines)
    data = (text if open_end else text + "\n").encode()
    path = tmp_path / f"in.jsonl{end}"
    path.write_bytes(gzip.compress(data) if end else data)
    files = discover([str(path)], "openai")
    scan = scan_input(files, None, rows)
    found: list[Any] = []
    for split in scan.splits(rows or 64):
        given = list(read_split(split, scan.schema))
        assert [row.index for row in given] == list(range(len(found), len(found) + split.rows))
        found += given
    assert len(found) == scan.rows
    expected: list[Any] = []
    for item in lines:
        if item == "":
            continue
        try:
            request = parsed(item.encode() if isinstance(item, str) else item)
        except BadRequest as error:
            expected.append(str(error))
        else:
            expected += [request.values(choice, scan.schema) for choice in range(request.choices)]
    assert len(found) == len(expected)
    for row, values in zip(found, expected, strict=True):
        if isinstance(row, BadRow):
            assert row.code == "bad_request"
            assert row.message.endswith(values)
        else:
            assert [row.values[name] for name in scan.schema.names] == values


def test_a_split_holds_no_more_rows_than_asked_unless_one_line_has_more(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    counts = [1, 1, 3, 1, 7, 2, 2, 1, 1, 1]
    path.write_text("".join(json.dumps(line(n=n)) + "\n" for n in counts))
    scan = scan_input(discover([str(path)], "openai"), None, 4)
    assert [split.rows for split in scan.splits(4)] == [2, 4, 7, 4, 3]


def test_log_probabilities_have_a_column_where_any_line_asks_for_them(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(json.dumps(item) for item in [line(), line(COMPLETIONS, logprobs=3)]))
    scan = scan_input(discover([str(path)], "openai"))
    assert scan.schema.names[-1] == "logprobs"
    split = scan.splits(64)[0]
    table = pa.Table.from_batches([part.batch for part in read_batches(split, scan.schema)])
    assert table["logprobs"].to_pylist() == [None, 3]
    path.write_text(json.dumps(line()))
    assert "logprobs" not in scan_input(discover([str(path)], "openai")).schema.names


def test_a_folder_gives_its_json_lines(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "c.csv"):
        (tmp_path / name).write_text("")
    files = discover([str(tmp_path)], "openai")
    assert [(Path(file.uri).name, file.format) for file in files] == [
        ("a.jsonl.gz", "openai"),
        ("b.jsonl", "openai"),
    ]
    (tmp_path / "a.jsonl.gz").unlink()
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(StorageError, match="a openai file"):
        discover([str(tmp_path)], "openai")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not valid UTF-8"),
        (b"[]", "no object"),
        (b'{"custom_id": "\\ud800", "url": "/v1/completions", "body": {}}', "custom_id"),
        (line(COMPLETIONS, prompt="\ud800"), "not valid Unicode"),
        ({}, "custom_id"),
        (line(custom_id=None), "custom_id"),
        (line(method="GET"), 'method is "GET"'),
        (line("\ud800"), 'url is "?"'),
        (line("/v1/embeddings"), "/v1/embeddings"),
        (line("/v1/responses"), "/v1/responses"),
        ({"custom_id": "a", "url": CHAT}, "body is null"),
        (line(n=0), "n is 0"),
        (line(n=1_000_000_000), "from 1 to 128"),
        (line(n=True), "n is true"),
        (line(COMPLETIONS, prompt=None), "prompt is null"),
        (line(COMPLETIONS, prompt=[]), "prompt is []"),
        (line(COMPLETIONS, prompt=["a", 1]), "prompt[1] is 1"),
        (line(COMPLETIONS, prompt=[[1, -2]]), "prompt[0] is [1, -2]"),
        (line(COMPLETIONS, prompt=["a"] * 2049), "2048 at most"),
        (line(COMPLETIONS, logprobs=True), "logprobs is true"),
        (line(COMPLETIONS, logprobs=21), "logprobs is 21"),
        (line(logprobs=1), "logprobs is 1"),
        (line(top_logprobs=2), "needs logprobs to be true"),
        (line(logprobs=True, top_logprobs=21), "top_logprobs is 21"),
    ],
)
def test_a_line_that_is_no_request_is_refused_in_one_sentence(value: Any, words: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parsed(value)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (line(messages=None), "messages is null"),
        (line(messages=[]), "messages is []"),
        (line(messages=["x"]), "messages[0]"),
        (line(messages=[{"role": "user"}]), "messages[0].content is null"),
        (line(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), '"image_url"'),
        (line(messages=[*MESSAGES, {"role": "user", "content": [{"type": "input_audio"}]}]), "messages[1]"),
        (line(temperature="hot"), 'temperature is "hot"'),
        (line(temperature=-1), "temperature is -1"),
        (line(temperature=True), "temperature is true"),
        (line(top_p=0), "top_p is 0"),
        (line(max_tokens=0), "max_tokens is 0"),
        (line(max_completion_tokens=1.5), "max_completion_tokens is 1.5"),
        (line(max_tokens=2, min_tokens=3), "min_tokens is 3"),
        (line(presence_penalty=3), "presence_penalty is 3"),
        (line(stop=[""]), "stop is"),
        (line(stop=[1]), "stop is [1]"),
        (line(stop={}), "stop is {}"),
        (line(seed="a"), 'seed is "a"'),
        (line(logit_bias=[1]), "logit_bias is [1]"),
        (line(logit_bias={"a": 1}), 'logit_bias names "a"'),
        (line(logit_bias={"1": "x"}), "logit_bias of 1"),
        (line(stop_token_ids=["</s>"]), "stop_token_ids"),
        (line(ignore_eos=1), "ignore_eos is 1"),
        (line(top_k=-2), "top_k is -2"),
        (line(stream=True), "stream is true"),
        (line(tools=[{"type": "function"}]), "tools is"),
        (line(response_format={"type": "json_schema"}), "response_format is"),
        (line(modalities=["text", "audio"]), "modalities is"),
        (line(audio={"voice": "x"}), "audio is"),
        (line(COMPLETIONS, echo=True), "echo is true"),
        (line(COMPLETIONS, suffix="x"), "suffix is"),
        (line(COMPLETIONS, best_of=3, n=2), "best_of is 3"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(value: Any, words: str) -> None:
    with pytest.raises(RowError) as refused:
        requested(value)
    assert refused.value.code == "bad_request"
    assert words in refused.value.message


def test_what_a_request_leaves_open_is_as_openai_has_it() -> None:
    assert sampled(line()) == SamplingParams(max_tokens=None, temperature=1.0)
    assert sampled(line(COMPLETIONS)) == SamplingParams(max_tokens=16, temperature=1.0)
    nothing = {
        "temperature": None,
        "stop": None,
        "max_tokens": None,
        "tools": None,
        "stream": None,
        "n": None,
    }
    assert sampled(line(**nothing)) == sampled(line())


def test_every_field_of_the_sampling_is_read() -> None:
    body = {
        "max_tokens": 9,
        "max_completion_tokens": 7,
        "min_tokens": 2,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": -1,
        "frequency_penalty": 0.5,
        "seed": 11,
        "stop": ["a", "b"],
        "stop_token_ids": [3],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "logit_bias": {"5": -100},
        "logprobs": True,
        "top_logprobs": 4,
        "n": 3,
    }
    assert sampled(line(**body)) == SamplingParams(
        max_tokens=7,
        min_tokens=2,
        temperature=0.0,
        top_p=0.5,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=-1.0,
        frequency_penalty=0.5,
        seed=11,
        stop=("a", "b"),
        stop_token_ids=(3,),
        include_stop=True,
        ignore_eos=True,
        logit_bias={5: -100.0},
        logprobs=4,
    )
    assert sampled(line(COMPLETIONS, logprobs=2, stop="x")).logprobs == 2
    assert sampled(line(COMPLETIONS, stop="xy")).stop == ("xy",)
    assert sampled(line(seed=-5)).seed == 2**63 - 5
    assert sampled(line(top_k=-1)).top_k == 0
    assert requested(line(), tokens=True)[1].logprobs == 0


def test_prompts_of_every_form() -> None:
    prompts = line(COMPLETIONS, prompt=["a", [1, 2]], n=2)
    assert [requested(prompts, choice)[0] for choice in range(4)] == ["a", "a", (1, 2), (1, 2)]
    assert requested(line(COMPLETIONS, prompt=[7, 8]))[0] == (7, 8)
    assert requested(line(COMPLETIONS, prompt="a"))[0] == "a"
    messages = [
        {"role": "developer", "content": "Be brief.", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]},
    ]
    assert requested(line(messages=messages))[0] == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "x"}]},
    )


def test_lines_of_other_tools_are_read() -> None:
    assert parsed(line(url=CHAT[3:], method=None)).url == CHAT
    assert parsed({**line(), "custom_id": 17, "id": "x", "extra": {}}).custom_id == "17"
    same = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "flex",
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "stream": False,
        "priority": 1,
        "skip_special_tokens": True,
    }
    assert sampled(line(**same)) == sampled(line())
    assert sampled(line(COMPLETIONS, best_of=2, n=2, echo=False)) == sampled(line(COMPLETIONS))


READ = {
    "messages",
    "prompt",
    "n",
    "temperature",
    "max_tokens",
    "max_completion_tokens",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "logit_bias",
    "logprobs",
    "top_logprobs",
}
CHANGES_NO_ANSWER = {
    "metadata",
    "model",
    "moderation",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "stream_options",
    "user",
}


@pytest.mark.parametrize("types", [completion_create_params, chat_create_params], ids=["text", "chat"])
def test_no_field_that_the_client_knows_is_passed_over_unseen(types: Any) -> None:
    known = set(types.CompletionCreateParamsNonStreaming.__annotations__)
    known |= set(types.CompletionCreateParamsBase.__annotations__)
    assert known - READ - CHANGES_NO_ANSWER - batch_requests._REFUSED.keys() <= set()
