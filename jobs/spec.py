"""The job spec: what to run, as one frozen value that is checked when it is made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
    model_validator,
)

from batchinfer.engine.types import SamplingParams
from batchinfer.jobs.backends.options import OptionsSpec
from batchinfer.jobs.credentials import checked_uri, options_without_credentials, without_credentials
from batchinfer.jobs.spec_errors import rule, sentence
from batchinfer.jobs.types import JobError

_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?\s*$", re.IGNORECASE)


def _source_as_model(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


def _one_as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _size_in_bytes(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match = _SIZE.match(value)
    if match is None:
        raise rule(f"is {value!r}, but it must be a size such as 16GiB or 500MB")
    number, prefix, binary = match.groups()
    return int(
        float(number) * (1024 if binary else 1000) ** ("KMGT".index(prefix.upper()) + 1 if prefix else 0)
    )


Uri = Annotated[str, AfterValidator(checked_uri)]
Positive = Annotated[StrictInt, Field(ge=1)]
Bytes = Annotated[Positive, BeforeValidator(_size_in_bytes, json_schema_input_type=int | str)]


class Part(BaseModel):
    """A part of a job spec: frozen, and strict about keys and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSpec(Part):
    """The model that answers, and in which precision."""

    source: Uri = Field(
        description="a Hugging Face id, a folder, a folder in object storage, a GGUF file or package://NAME/FILE",
        examples=["Qwen/Qwen3-0.6B"],
    )
    dtype: Literal["bf16", "fp16", "fp32"] = Field(default="bf16", description="of weights and activations")
    quantize: Literal["int8", "int4", "fp8"] | None = Field(
        default=None, description="quantize the weights at load"
    )
    max_context: Positive | None = Field(
        default=None,
        description="longest prompt and completion together, in tokens; null: the model's own limit",
        examples=[4096],
    )
    kv_dtype: Literal["auto", "bf16", "int8", "fp8"] = Field(default="auto", description="of the KV cache")


class InputSpec(Part):
    """The data set: each row becomes one prompt."""

    uri: Annotated[
        tuple[Uri, ...],
        Field(min_length=1),
        BeforeValidator(_one_as_list, json_schema_input_type=str | list[str]),
    ] = Field(
        description="a file, a folder, a glob, or a list of them",
        examples=["s3://bucket/prompts/*.parquet"],
    )
    format: Literal["auto", "parquet", "arrow", "jsonl", "csv", "openai"] = Field(
        default="auto",
        description="auto: by the file names; openai: batch files, each line with its prompt and sampling",
    )
    delimiter: str | None = Field(
        default=None,
        pattern=r'^[^"\r\n]$',
        description="what separates the fields of CSV; null: found: a comma, semicolon, tab or bar",
        examples=[";"],
    )
    columns: tuple[str, ...] | None = Field(
        default=None, description="columns to pass through; null: all", examples=[["id", "language"]]
    )


class MessageSpec(Part):
    """One chat message; its content is a template."""

    role: str = Field(
        min_length=1,
        description="system, user, assistant, or what the model's template knows",
        examples=["system"],
    )
    content: str = Field(
        description="a Jinja2 template over the row", examples=["You translate into {{ language }}."]
    )


class SamplingSpec(Part):
    """How completions are chosen and when they end; the fields are those of SamplingParams."""

    max_tokens: StrictInt | None = Field(
        default=256, description="tokens to generate at most; null: up to max_context", examples=[64]
    )
    min_tokens: StrictInt = Field(
        default=0, description="tokens before a stop string or the end of the sequence counts", examples=[1]
    )
    temperature: StrictFloat = Field(default=0.0, description="0 is greedy", examples=[0.7])
    top_k: StrictInt = Field(default=0, description="0: off", examples=[40])
    top_p: StrictFloat = Field(default=1.0, description="1: off", examples=[0.9])
    min_p: StrictFloat = Field(default=0.0, description="0: off", examples=[0.05])
    repetition_penalty: StrictFloat = Field(
        default=1.0, description="1: off; over prompt and completion", examples=[1.1]
    )
    presence_penalty: StrictFloat = Field(
        default=0.0, description="0: off; over the completion", examples=[0.5]
    )
    frequency_penalty: StrictFloat = Field(
        default=0.0, description="0: off; over the completion", examples=[0.5]
    )
    logit_bias: dict[int, StrictFloat] = Field(
        default_factory=dict, description="added to logits, by token id", examples=[{220: -100.0}]
    )
    seed: StrictInt = Field(
        default=0, description="of the sampling noise, with the row's position", examples=[7]
    )
    stop: Annotated[
        tuple[str, ...], BeforeValidator(_one_as_list, json_schema_input_type=str | list[str])
    ] = Field(default=(), description="strings that end a completion", examples=[["\n\n"]])
    stop_token_ids: tuple[StrictInt, ...] = Field(
        default=(), description="token ids that end a completion", examples=[[2]]
    )
    include_stop: StrictBool = Field(default=False, description="keep the stop string in the completion")
    ignore_eos: StrictBool = Field(default=False, description="go on after the end-of-sequence token")
    n: StrictInt = Field(default=1, description="samples of each row", examples=[4])
    logprobs: StrictInt | None = Field(
        default=None, description="0: of the sampled tokens; k: and of the k most likely", examples=[0]
    )
    prompt_logprobs: StrictInt | None = Field(
        default=None, description="the same for the prompt's tokens", examples=[0]
    )

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        try:
            SamplingParams(**dict(self))
        except ValueError as error:
            field, _, rest = str(error).partition(" ")
            raise rule(rest, field=field) from None
        return self


class OutputSpec(Part):
    """Where the answers go; the URI is the job's address from then on."""

    uri: Uri = Field(description="a folder that no other job uses", examples=["s3://bucket/answers/"])
    tokens: StrictBool = Field(
        default=False, description="add token ids, log-probabilities and costs, one entry a token"
    )


class ShardsSpec(Part):
    """How the input is cut."""

    rows: Positive | None = Field(
        default=None, description="rows of a shard; null: a few minutes of work", examples=[10_000]
    )


class WorkersSpec(Part):
    """Who does the work; may change between submits of one job."""

    count: Positive = Field(default=1, description="workers to start", examples=[8])
    backend: Literal["local", "slurm", "kubernetes", "aws_batch", "gcp_batch", "ray"] = Field(
        default="local", description="who starts them"
    )
    gpus: StrictInt = Field(
        default=1, ge=0, description="of one worker; without any it runs on the CPU", examples=[0]
    )
    cpus: StrictFloat | None = Field(default=None, gt=0, description="of one worker", examples=[8.0])
    memory: Bytes | None = Field(
        default=None,
        description="of one worker, such as 16GiB; local workers share out this machine's",
        examples=["16GiB"],
    )
    image: str | None = Field(
        default=None,
        description="the container image of a worker, for backends that run containers",
        examples=["registry.example.com/batchinfer:0.1.0"],
    )
    spot: StrictBool = Field(
        default=True, description="use interruptible machines where the backend has them"
    )
    max_attempts: Positive = Field(
        default=5, description="starts of one worker before it is given up", examples=[3]
    )
    options: Annotated[OptionsSpec, BeforeValidator(options_without_credentials)] = Field(
        default=OptionsSpec(), description="further settings, by backend"
    )


class PriceSpec(Part):
    """What a worker costs."""

    usd_per_hour: StrictFloat | None = Field(
        default=None, ge=0, description="of one worker, in USD; null: costs stay empty", examples=[2.5]
    )


class BudgetSpec(Part):
    """What a job may cost at most."""

    max_usd: StrictFloat | None = Field(
        default=None, gt=0, description="in USD; null: no limit", examples=[100.0]
    )
    max_worker_hours: StrictFloat | None = Field(
        default=None, gt=0, description="null: no limit", examples=[40.0]
    )


class FailuresSpec(Part):
    """When failing rows stop the job."""

    max_share: StrictFloat = Field(
        default=0.05, ge=0, le=1, description="of rows failed, above which the job stops", examples=[0.2]
    )
    after_rows: Positive = Field(
        default=200, description="rows that must be done before max_share counts", examples=[1000]
    )


class StoreSpec(Part):
    """Where a store is; credentials come from the environment or the role."""

    endpoint_url: str | None = Field(
        default=None, description="of a store that speaks S3", examples=["http://localhost:9000"]
    )
    region: str | None = Field(default=None, description="of its buckets", examples=["eu-central-1"])


PromptField = Literal["prompt", "messages", "prompt_column", "messages_column"]
PROMPT_FIELDS: tuple[PromptField, ...] = ("prompt", "messages", "prompt_column", "messages_column")


def _exactly_one_prompt(schema: dict[str, Any]) -> None:
    prompts: list[dict[str, Any]] = [
        {"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in PROMPT_FIELDS
    ]
    batch_file = {
        "properties": {"input": {"required": ["format"], "properties": {"format": {"const": "openai"}}}}
    }
    schema["if"] = batch_file
    schema["then"] = {"not": {"anyOf": prompts}}
    schema["else"] = {"oneOf": prompts}


class JobSpec(Part):
    """A job: a model, a data set, a prompt made of each row, and where the answers go."""

    model_config = ConfigDict(json_schema_extra=_exactly_one_prompt)

    name: str | None = Field(default=None, description="for people", examples=["summaries"])
    model: Annotated[
        ModelSpec, BeforeValidator(_source_as_model, json_schema_input_type=str | ModelSpec)
    ] = Field(description="the model, or just its source as a string")
    input: InputSpec
    prompt: str | None = Field(
        default=None, description="a Jinja2 template over the row", examples=["Summarise:\n\n{{ text }}"]
    )
    messages: Annotated[tuple[MessageSpec, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="chat messages whose contents are Jinja2 templates",
        examples=[[{"role": "user", "content": "{{ text }}"}]],
    )
    prompt_column: str | None = Field(
        default=None, description="the column that holds the prompt", examples=["question"]
    )
    messages_column: str | None = Field(
        default=None,
        description="the column that holds chat messages: a list of {role, content}, or it as JSON",
        examples=["messages"],
    )
    sampling: SamplingSpec = SamplingSpec()
    output: OutputSpec
    shards: ShardsSpec = ShardsSpec()
    workers: WorkersSpec = WorkersSpec()
    price: PriceSpec = PriceSpec()
    budget: BudgetSpec = BudgetSpec()
    failures: FailuresSpec = FailuresSpec()
    storage: Annotated[dict[str, StoreSpec], BeforeValidator(without_credentials)] = Field(
        default_factory=dict,
        description="settings of stores, by URI prefix; never credentials",
        examples=[{"s3://bucket/": {"region": "eu-central-1"}}],
    )

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        given = [name for name in PROMPT_FIELDS if getattr(self, name) is not None]
        if self.input.format == "openai":
            own = [*given, *["sampling"] * (self.sampling != SamplingSpec())]
            if own:
                raise rule(
                    "can't be given beside input.format openai, as every line of a batch file carries its "
                    "own: remove it",
                    field=own[0],
                )
        elif len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise rule(
                f"exactly one of {', '.join(PROMPT_FIELDS)} says what to ask the model, but there is "
                f"{found}"
            )
        if self.budget.max_usd is not None and self.price.usd_per_hour is None:
            raise rule(
                "needs price.usd_per_hour, to know what a worker costs: add it, or set "
                "budget.max_worker_hours instead",
                field="budget.max_usd",
            )
        for prefix in self.storage:
            if "://" not in prefix:
                raise rule(
                    "is no URI prefix: write the key as the beginning of a URI, such as s3://bucket/",
                    field=f"storage.{prefix}",
                )
        return self

    def storage_options(self) -> dict[str, dict[str, Any]]:
        """The settings of stores by URI prefix, as ``connectors.storage`` takes them."""
        return {prefix: store.model_dump() for prefix, store in self.storage.items()}

    def sampling_params(self) -> SamplingParams:
        """The sampling of every row; with ``output.tokens`` the sampled tokens' log-probabilities too."""
        fields = dict(self.sampling)
        if self.output.tokens and fields["logprobs"] is None:
            fields["logprobs"] = 0
        return SamplingParams(**fields)


def parse_spec(data: Any, where: str = "the job spec") -> JobSpec:
    """The spec that ``data`` (what YAML or JSON gives) describes; raises JobError in one sentence."""
    if not isinstance(data, Mapping):
        raise JobError(f"{where} must hold a mapping of fields such as model, input, prompt and output")
    try:
        return JobSpec.model_validate(data)
    except ValidationError as error:
        raise JobError(f"{where}: {sentence(error, JobSpec)}") from None
